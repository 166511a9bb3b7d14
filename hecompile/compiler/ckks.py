"""Compile a checkpoint into a polynomial plan, with which a worker evaluates the whole model on ciphertexts.

    OUT/client   plan.json, embeddings.npy (float32 [V, H]), the tokenizer
    OUT/worker   plan.json, circuit.onnx at stage `refreshed`, its weights inside

The plan id is a hash of the circuit and of the parameters. Nothing here is secret: keys are drawn per session.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from hecompile.bundles.ckks import CkksPlan
from hecompile.bundles.kinds import CIRCUIT, TABLE, BundleKind
from hecompile.checkpoint.adapter import check_settings, check_targets, default_settings, read_matrices, read_settings
from hecompile.checkpoint.families import LLAMA_LINEARS
from hecompile.checkpoint.loading import answer_ends
from hecompile.checkpoint.tokenizer import write_answer_ends
from hecompile.checkpoint.values import number, whole
from hecompile.ckks.circuit import PolynomialCircuit
from hecompile.ckks.parameters import CkksParameters
from hecompile.compiler.calibration import write_samples
from hecompile.compiler.frontend import Checkpoint, export_onnx, load_checkpoint
from hecompile.compiler.options import CkksOptions
from hecompile.compiler.pipeline import lower_polynomial
from hecompile.compiler.polynomial_options import PolynomialOptions, require_polynomials, require_trained
from hecompile.compiler.target import check_target
from hecompile.errors import InputError
from hecompile.files import only_writer, reason_of, replace_directory
from hecompile.he.random.sampling import PublicSeed

_PHASES = {"expand_polynomials": "expand", "place_refreshes": "place refreshes"}
"""Step of the pipeline → name of the phase that it begins."""
_CALIBRATION_SEED = PublicSeed(hashlib.sha256(b"hecompile ckks calibration").digest())

Progress = Callable[[str], None]
"""Receives the name of each phase as it begins."""


def export_polynomial(
    model: str, out: Path, options: CkksOptions, adapter: Path | None = None, progress: Progress = lambda _: None
) -> CkksPlan:
    """Compile a checkpoint, with a PEFT adapter merged into it, into OUT/client and OUT/worker.

    Raises InputError for options, adapter or directory that do not fit, and where no parameters of 128 bits have the levels;
    LegalityError where a part of the model is no polynomial, or calibration leaves a domain. `out` is then as it was.
    """
    check_target(out, BundleKind.CKKS_CLIENT)
    with only_writer(out):
        check_target(out, BundleKind.CKKS_CLIENT)  # another export may have ended in between
        return _export(model, out, options, adapter, progress)


def _export(model: str, out: Path, options: CkksOptions, adapter: Path | None, progress: Progress) -> CkksPlan:
    progress("load")
    checkpoint = load_checkpoint(model)
    if options.sequence_length > checkpoint.model.config.max_position_embeddings:
        raise InputError(
            f"the sequence length {options.sequence_length} is more than the model's "
            f"{checkpoint.model.config.max_position_embeddings} positions"
        )
    if adapter is not None:
        checkpoint = merged_checkpoint(checkpoint, adapter)
    graph, parameters, depth = lower_checkpoint(checkpoint, options, progress)
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
    _write(out, plan, serialized, table, checkpoint)
    return plan


def lower_checkpoint(
    checkpoint: Checkpoint, options: CkksOptions, progress: Progress = lambda _: None
) -> tuple[ir.Model, CkksParameters, int]:
    """Export a checkpoint and run the polynomial pipeline on it (`hecompile.compiler.pipeline.lower_polynomial`).

    Returns the graph at stage `refreshed`, parameters that have its levels, and the depth that it has without refreshes.
    Raises LegalityError where a part of the model is no polynomial, or calibration leaves a domain.
    """
    polynomials = options.polynomials(checkpoint.model.config)
    require_polynomials(checkpoint.name, polynomials)
    if not options.unconverted:
        require_trained(checkpoint.name, PolynomialOptions.from_config(checkpoint.model.config), polynomials)
    progress("export")
    model = export_onnx(checkpoint.model)
    progress("calibrate")
    samples = write_samples(checkpoint, model, polynomials, _CALIBRATION_SEED, options.sequence_length)

    def on_step(name: str) -> None:
        if name in _PHASES:
            progress(_PHASES[name])

    return lower_polynomial(model, options, polynomials, samples, on_step)


def merged_checkpoint(checkpoint: Checkpoint, adapter: Path) -> Checkpoint:
    """Put W + scaling·B·A in place of W. Raises InputError where the adapter is none, is of another kind, or does not fit.

    The weights of `checkpoint` are changed. PEFT, given the folder, would do whatever else its settings ask for.
    """
    settings = read_settings(adapter)
    check_settings(adapter, settings, default_settings(), free=("r", "lora_alpha"))
    rank = whole(str(adapter), "r", settings["r"], 1, 2**20)
    alpha = number(str(adapter), "lora_alpha", settings["lora_alpha"])
    state = read_matrices(adapter)
    check_targets(adapter, settings, state)
    linears = {
        name: module
        for name, module in checkpoint.model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in LLAMA_LINEARS
    }
    pairs = _pairs(adapter, checkpoint.name, state, linears, rank)
    with torch.no_grad():
        for name, (a, b) in pairs.items():  # [r, in], [out, r]
            merged = linears[name].weight + (b @ a) * (alpha / rank)
            if not torch.isfinite(merged).all():
                raise InputError(f"the adapter {adapter} makes weights of {name} that are not finite")
            linears[name].weight = torch.nn.Parameter(merged)
    return checkpoint


def _pairs(
    adapter: Path, model: str, state: dict[str, Tensor], linears: Mapping[str, torch.nn.Linear], rank: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B of every linear that the adapter has matrices for. Raises InputError unless all of them fit."""
    left, pairs = dict(state), {}
    for name, linear in linears.items():
        keys = [f"base_model.model.{name}.lora_{side}.weight" for side in "AB"]
        if not any(key in left for key in keys):
            continue
        for key, shape in zip(keys, ((rank, linear.in_features), (linear.out_features, rank)), strict=True):
            found = list(left[key].shape) if key in left else "missing"
            if found != list(shape):
                raise InputError(
                    f"the adapter {adapter} does not fit {model}: {key} is {found} but must be {list(shape)}"
                )
        a, b = (left.pop(key).to(torch.float32) for key in keys)
        pairs[name] = (a, b)
    if left or not pairs:
        which = f"has no place for {min(left)}" if left else "has no matrices of LoRA for it"
        raise InputError(f"the adapter {adapter} does not fit {model}, which {which}")
    return pairs


def _write(out: Path, plan: CkksPlan, circuit: bytes, table: NDArray[Any], checkpoint: Checkpoint) -> None:
    """Write beside `out`, then rename. Raises InputError where it cannot be written; `out` is then as it was."""
    staged = out.parent / f".{out.name}.{os.getpid()}.partial"  # a name that nobody else has anything at
    client, worker = staged / "client", staged / "worker"
    try:
        for directory in (client, worker):
            directory.mkdir(parents=True)
            plan.write(directory)
        (worker / CIRCUIT).write_bytes(circuit)
        np.save(client / TABLE, np.ascontiguousarray(table, dtype=np.float32))
        checkpoint.tokenizer.save_pretrained(client)
        write_answer_ends(client, answer_ends(checkpoint.model))
        replace_directory(staged, out)
    except OSError as error:
        raise InputError(f"cannot write {out}: {reason_of(error)}") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
