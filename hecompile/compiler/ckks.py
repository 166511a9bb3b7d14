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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import peft
import transformers
from numpy.typing import NDArray

from hecompile.bundles.ckks import CkksPlan
from hecompile.bundles.kinds import CIRCUIT, TABLE, BundleKind
from hecompile.ckks.circuit import PolynomialCircuit
from hecompile.ckks.parameters import CkksLiteral, CkksParameters, select
from hecompile.compiler.calibration import calibration_for
from hecompile.compiler.frontend import Checkpoint, export_onnx, load_checkpoint
from hecompile.compiler.pipeline import approximate_steps, polynomial_steps, raise_steps, refresh_steps, run_steps
from hecompile.compiler.polynomial_options import PolynomialOptions
from hecompile.compiler.target import check_target
from hecompile.errors import InputError, LegalityError
from hecompile.files import reason_of, replace_directory
from hecompile.he.random.sampling import PublicSeed
from hecompile.passes.approximation.approximate_silu import ApproximateSiLU
from hecompile.passes.approximation.calibrate import Calibrate
from hecompile.passes.polynomial.depth import METADATA as DEPTH
from hecompile.passes.polynomial.expand_polynomials import ExpandPolynomials
from hecompile.passes.polynomial.place_refreshes import PlaceRefreshes

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
    converted = PolynomialOptions.from_config(checkpoint.model.config)
    polynomials = converted.choosing(options.attention, options.norm, options.activation)
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
        replace_directory(staged, out)
    except OSError as error:
        raise InputError(f"cannot write {out}: {reason_of(error)}") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
