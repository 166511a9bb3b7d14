"""A polynomial plan on disk: what the client keeps, and what a worker needs to evaluate the whole model on ciphertexts.

    OUT/client   plan.json, embeddings.npy (float32 [V, H]), the tokenizer
    OUT/worker   plan.json, circuit.onnx at stage `refreshed`, its weights inside

The plan id is a hash of the circuit and of the parameters. Nothing here is secret: keys are drawn per session.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import peft
import transformers
from numpy.typing import NDArray
from pydantic import TypeAdapter

from hecompile.bundle_kinds import CIRCUIT, PLAN, TABLE, BundleKind, mistaken
from hecompile.ckks.circuit import PolynomialCircuit
from hecompile.ckks.parameters import CkksLiteral, CkksParameters, select
from hecompile.compiler import CompileOptions, calibration_for
from hecompile.errors import InputError, LegalityError
from hecompile.files import publish, reason_of
from hecompile.frontend import Checkpoint, export_onnx, load_checkpoint
from hecompile.he.sampling import PublicSeed
from hecompile.passes.approximate_silu import ApproximateSiLU
from hecompile.passes.calibrate import Calibrate
from hecompile.passes.depth import METADATA as DEPTH
from hecompile.passes.expand_polynomials import ExpandPolynomials
from hecompile.passes.place_refreshes import PlaceRefreshes
from hecompile.pipeline import approximate_steps, polynomial_steps, raise_steps, refresh_steps, run_steps
from hecompile.polynomial_options import PolynomialOptions
from hecompile.target import check_target

FORMAT = "hecompile-ckks-1"
_CALIBRATION_SEED = PublicSeed(hashlib.sha256(b"hecompile ckks calibration").digest())


@dataclass(frozen=True)
class CkksOptions:
    """sequence_length: tokens of a prompt at most. levels: multiplications between two refreshes; 0: no refresh at all,
    with as many levels as the graph is deep. ring_dim: None for the smallest that has them. attention, norm, activation: as
    for `CompileOptions`. last_only: logits of the last position alone, for prompts of exactly sequence_length tokens."""

    sequence_length: int
    levels: int = 4
    ring_dim: int | None = None
    attention: str | None = None
    norm: str | None = None
    activation: str | None = None
    last_only: bool = False

    def __post_init__(self) -> None:
        if self.levels < 0:
            raise InputError(f"levels must be at least 1, or 0 for no refreshes, got {self.levels}")
        if self.sequence_length < 2:
            raise InputError(f"the sequence length must be at least 2, got {self.sequence_length}")


@dataclass(frozen=True)
class CkksPlan:
    """plan.json. refreshes: name of each refreshed value → its shape, the batch axis being 1."""

    model: str
    plan_id: str
    parameters: dict[str, int]
    sequence_length: int
    last_only: bool
    hidden: int
    vocabulary: int
    depth: int
    refreshes: dict[str, list[int]]

    @classmethod
    def read(cls, directory: str | Path) -> CkksPlan:
        """Raises InputError naming what is wrong."""
        path = Path(directory) / PLAN
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found.pop("format") != FORMAT:
                raise ValueError
            cls(**found)  # no field is missing or unknown; their types are checked next
            return TypeAdapter(cls).validate_json(json.dumps(found), strict=True)
        except OSError:
            said = mistaken(Path(directory), BundleKind.CKKS_CLIENT)
            none = f"{directory} is no polynomial bundle (no {PLAN}); make one with `hecompile ckks export`"
            raise InputError(said or none) from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{path} is not a plan of this version; export again") from None

    def write(self, directory: Path) -> None:
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"
        (directory / PLAN).write_text(text, encoding="utf-8")


def is_polynomial_plan(directory: str | Path) -> bool:
    """Whether a client's bundle is one of `export_polynomial`, of any version."""
    return (Path(directory) / PLAN).is_file()


def is_polynomial_bundle(directory: str | Path) -> bool:
    """Whether a directory is what `export_polynomial` wrote, or one half of it, of any version."""
    parts = (Path(directory), Path(directory) / "client", Path(directory) / "worker")
    return any(is_polynomial_plan(part) for part in parts)


Progress = Callable[[str], None]


def export_polynomial(
    model: str, out: Path, options: CkksOptions, adapter: Path | None = None, progress: Progress = lambda _: None
) -> CkksPlan:
    """Compile a checkpoint, with a PEFT adapter merged into it, into OUT/client and OUT/worker.

    Raises InputError for options, adapter or directory that do not fit, and where no parameters of 128 bits have the levels;
    LegalityError where a part of the model is no polynomial, or calibration leaves a domain. `out` is then as it was.
    """
    check_target(out, BundleKind.CKKS_CLIENT)
    progress("load")
    checkpoint = load_checkpoint(model)
    if options.sequence_length > checkpoint.model.config.max_position_embeddings:
        raise InputError(
            f"the sequence length {options.sequence_length} is more than the model's "
            f"{checkpoint.model.config.max_position_embeddings} positions"
        )
    if adapter is not None:
        checkpoint = merged_checkpoint(checkpoint, adapter)
    graph, parameters, depth = lower_polynomial(checkpoint, options, progress)
    circuit = PolynomialCircuit(graph)  # refuses what has no implementation on ciphertexts, before anything is written
    progress("write")
    serialized = ir.to_proto(graph).SerializeToString()
    fields = parameters.fields()
    plan_id = hashlib.sha256(serialized + json.dumps(fields, sort_keys=True).encode()).hexdigest()
    table = checkpoint.model.get_input_embeddings().weight.detach().numpy()  # type: ignore[operator]
    plan = CkksPlan(
        model=checkpoint.name, plan_id=plan_id, parameters=fields, sequence_length=options.sequence_length,
        last_only=options.last_only, hidden=table.shape[1], vocabulary=len(table), depth=depth,
        refreshes={name: list(shape) for name, shape in circuit.refreshed.items()},
    )  # fmt: skip
    _write(out, plan, serialized, table, checkpoint.tokenizer)
    return plan


def lower_polynomial(
    checkpoint: Checkpoint, options: CkksOptions, progress: Progress = lambda _: None
) -> tuple[ir.Model, CkksParameters, int]:
    """The graph at stage `refreshed`, the parameters that have its levels, and the depth of the graph without refreshes."""
    chosen = CompileOptions(attention=options.attention, norm=options.norm, activation=options.activation)
    polynomials = chosen.polynomials(checkpoint.model.config)
    _require_polynomials(checkpoint.name, polynomials)
    progress("export")
    model = run_steps(export_onnx(checkpoint.model), raise_steps(polynomials))
    progress("calibrate")
    samples = calibration_for(checkpoint, polynomials, model, _CALIBRATION_SEED, options.sequence_length)
    model = run_steps(model, approximate_steps(Calibrate(samples), polynomials))
    progress("expand")
    model = run_steps(model, polynomial_steps(ExpandPolynomials(options.sequence_length, options.last_only)))
    depth = int(model.metadata_props[DEPTH])
    levels = options.levels or depth
    parameters = select(levels) if options.ring_dim is None else CkksLiteral(options.ring_dim, levels).validate()
    progress("place refreshes")
    model = run_steps(model, refresh_steps(PlaceRefreshes(levels), parameters.literal.scale_bits))
    return model, parameters, depth


def _require_polynomials(model: str, chosen: PolynomialOptions) -> None:
    """Raises LegalityError naming each part that is none and the option that makes it one. The pass that expands them would
    stop at the first such node, and knows neither options nor commands."""
    exact, remedies = [], []
    if chosen.attention is None:
        exact.append("attention (softmax)")
        remedies.append("--attention chebyshev")
    if chosen.norm is None:
        exact.append("norm (RMSNorm)")
        remedies.append("--norm polynomial")
    if not isinstance(chosen.activation, ApproximateSiLU):
        exact.append("activation (SiLU)" if chosen.activation is None else "activation (a table)")
        remedies.append("--activation polynomial")
    if exact:
        raise LegalityError(
            f"{model}: no polynomial stands for its {', '.join(exact)}, and ciphertexts know sums and products only. Export "
            f"it with {' '.join(remedies)}, or take a checkpoint that `hecompile convert` has trained for polynomials and "
            "that, as a rule, needs fewer levels (docs/conversion.md)"
        )
    attention = chosen.attention
    if attention is not None and attention.variant == "power" and attention.division == "exact":
        raise LegalityError(
            f"{model}: its power attention divides exactly, which is no polynomial. Convert the checkpoint by a recipe with "
            "variant power and division goldschmidt, as models/recipes/convert-power.yaml has it (docs/conversion.md), or "
            "export with --attention chebyshev where the model was trained with softmax"
        )


def merged_checkpoint(checkpoint: Checkpoint, adapter: Path) -> Checkpoint:
    """W + scaling·B·A in place of W, by PEFT. Raises InputError where the adapter is none or does not fit."""
    if not (adapter / "adapter_config.json").is_file():
        raise InputError(f"{adapter} is no PEFT adapter: it has no adapter_config.json")
    try:
        model: Any = peft.PeftModel.from_pretrained(checkpoint.model, str(adapter))
        merged: transformers.PreTrainedModel = model.merge_and_unload()
    except Exception as error:  # PEFT, torch and safetensors raise many kinds for a file that does not fit
        raise InputError(f"the adapter {adapter} does not fit {checkpoint.name}: {str(error).splitlines()[0]}") from error
    return Checkpoint(checkpoint.name, merged.eval(), checkpoint.tokenizer)


def _write(out: Path, plan: CkksPlan, circuit: bytes, table: NDArray[Any], tokenizer: Any) -> None:
    """Written beside `out` and renamed. Raises InputError where it cannot be written; all is then as it was."""
    staged = out.parent / f".{out.name}.{os.getpid()}.partial"  # a name that nobody else has anything at
    client, worker = staged / "client", staged / "worker"
    try:
        for directory in (client, worker):
            directory.mkdir(parents=True)
            plan.write(directory)
        (worker / CIRCUIT).write_bytes(circuit)
        np.save(client / TABLE, np.ascontiguousarray(table, dtype=np.float32))
        tokenizer.save_pretrained(client)
        publish(staged, out)
    except OSError as error:
        raise InputError(f"cannot write {out}: {reason_of(error)}") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def read_table(directory: str | Path, plan: CkksPlan) -> NDArray[np.float32]:
    """The client's embeddings, float32 [V, H]. Raises InputError when they are not those of the plan."""
    path = Path(directory) / TABLE
    try:
        table: NDArray[np.float32] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        said = mistaken(Path(directory), BundleKind.CKKS_CLIENT)
        raise InputError(said or f"{path} cannot be read; export again") from error
    if table.shape != (plan.vocabulary, plan.hidden) or table.dtype != np.float32:
        raise InputError(f"{path} is not the table of the plan; export again")
    return table


def open_worker(directory: str | Path) -> tuple[CkksPlan, PolynomialCircuit, CkksParameters]:
    """The worker's half. Raises InputError when the circuit is not the one of the plan, SecurityError under 128 bits."""
    if (said := mistaken(Path(directory), BundleKind.CKKS_WORKER)) is not None:
        raise InputError(said)
    plan = CkksPlan.read(directory)
    path = Path(directory) / CIRCUIT
    try:
        serialized = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); copy the worker bundle again") from None
    found = hashlib.sha256(serialized + json.dumps(plan.parameters, sort_keys=True).encode()).hexdigest()
    if found != plan.plan_id:
        raise InputError(f"{path} is not the circuit of {PLAN}; copy the worker bundle again")
    circuit = PolynomialCircuit(ir.from_proto(onnx.ModelProto.FromString(serialized)))
    return plan, circuit, CkksParameters.from_fields(plan.parameters)
