"""Compile a checkpoint into the two bundles of a plan of linears, written as a whole or not at all."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
import transformers

from hecompile.bundles.client import (
    CHECKS,
    PLAN,
    PLAN_DATA,
    TOKENIZER,
    WRAPS,
    CircuitRecord,
    LoraRecord,
    PlanRecord,
    RingRecord,
    graph_sha256,
    write_manifest,
)
from hecompile.bundles.client import VERSION as CLIENT_VERSION
from hecompile.bundles.client_files import FileRecord
from hecompile.bundles.kinds import CLIENT, BundleKind
from hecompile.bundles.worker import VERSION as WORKER_VERSION
from hecompile.checkpoint.configuration import family_of
from hecompile.checkpoint.loading import answer_ends
from hecompile.checkpoint.rope import longest_exact
from hecompile.checkpoint.tokenizer import write_answer_ends
from hecompile.compiler.calibration import SHORT_LENGTH, write_samples
from hecompile.compiler.calibration_file import read_samples
from hecompile.compiler.circuit_writer import Progress, write_circuits, write_circuits_without_hints
from hecompile.compiler.frontend import export_onnx, fill, open_checkpoint
from hecompile.compiler.options import CompileOptions
from hecompile.compiler.pipeline import lower_linear
from hecompile.compiler.polynomial_options import PolynomialOptions, require_trained
from hecompile.compiler.shelf import Shelf
from hecompile.compiler.staging import staging
from hecompile.compiler.target import check_target
from hecompile.errors import InputError
from hecompile.files import found_anywhere, only_writer
from hecompile.he.check_store import SERIES, write_checks
from hecompile.he.check_tolerances import Rows
from hecompile.he.check_vectors import Checks
from hecompile.he.hint_rounding import WORD_BITS
from hecompile.he.parameters import RingParameters
from hecompile.he.random.sampling import PublicSeed, SecretRandom
from hecompile.he.wraps import WrapChecks, write_wrap_checks
from hecompile.memory import large_arrays_apart
from hecompile.plan.circuits import RemoteCircuit, SplitPlan, weight_bits


def _silent(what: str, done: int, total: int) -> None:
    return None


def compile_checkpoint(
    model_name_or_path: str, out: Path, options: CompileOptions, progress: Progress = _silent
) -> str:
    """Compile a checkpoint into `out`/client and `out`/worker; return the plan id.

    The result is deterministic for a given `options.public_seed`, except the client's check vectors, which are secret.
    `out` may be missing, empty or an earlier build, which is replaced; it is left as it was if anything fails. An
    interruption keeps the hints that are complete beside `out`, and the next call with the same arguments goes on from
    there (`hecompile.compiler.staging`). Raises HecompileError.
    """
    check_target(out, BundleKind.CLIENT)
    with only_writer(out), large_arrays_apart():
        check_target(out, BundleKind.CLIENT)  # another export may have ended in between
        return _compile(model_name_or_path, out, options, progress)


def _compile(model_name_or_path: str, out: Path, options: CompileOptions, progress: Progress) -> str:
    progress("load", 0, 1)
    checkpoint = open_checkpoint(model_name_or_path)
    name, tokenizer, ends = checkpoint.name, checkpoint.tokenizer, answer_ends(checkpoint.model)
    family = family_of(checkpoint.model.config)
    longest, what = longest_exact(checkpoint.model.config)
    if options.sequence_buckets[-1] > longest:
        raise InputError(f"sequence bucket {options.sequence_buckets[-1]} is longer than {what}")
    polynomials = options.polynomials(checkpoint.model.config)
    if not options.unconverted:
        require_trained(name, PolynomialOptions.from_config(checkpoint.model.config), polynomials)
    length = options.sequence_buckets[-1] if polynomials else min(SHORT_LENGTH, longest)
    given = None if options.calibration is None else read_samples(options.calibration, tokenizer, length)
    request = f"{CLIENT_VERSION} {WORKER_VERSION} {name} {options!r} {polynomials!r}"
    with staging(out, request, options.public_seed or PublicSeed.draw()) as stage:
        seed = stage.public_seed
        progress("export", 0, 1)
        model = export_onnx(checkpoint.model)
        fill(model, checkpoint)
        progress("sample", 0, 1)
        samples = given or write_samples(checkpoint, model, polynomials, seed, length)
        del checkpoint
        gc.collect()  # the exporter's program is part of reference cycles
        shelf = Shelf(stage.scratch)
        plan, ring = lower_linear(
            model, options, samples, lambda step: progress(step, 0, 1), polynomials, shelf.keep, shelf.keep_rows
        )
        del model
        record = _plan_record(name, plan, ring, seed, options, family.conv1d)
        where = (stage, plan, ring, record.plan_id(), progress)
        if options.hints == "computed":
            hints = write_circuits_without_hints(*where)
        else:
            hints = write_circuits(*where, fetched=options.hints == "fetched")
        progress("checks", 0, 1)
        random = SecretRandom()
        for circuit in plan.circuits:
            weight = torch.from_numpy(circuit.weight).t()  # [out, in]
            rows = Rows(weight, random)
            series = [Checks.draw(weight, random, rows) for _ in range(SERIES)]
            for checks in series:
                checks.tolerances(circuit.parameters)  # raises where those rows cannot be verified at that precision
            write_checks(stage.build / CLIENT / CHECKS, circuit.name, *series)
            if (largest := circuit.largest_factor) is not None:
                path = stage.build / CLIENT / WRAPS / f"{circuit.name}.npy"
                write_wrap_checks(path, WrapChecks.draw(weight, largest, random))
        progress("write", 0, 1)
        _write_client(stage.build / CLIENT, plan, tokenizer, ends, record, hints)
    return record.plan_id()


def _plan_record(
    base_model: str,
    plan: SplitPlan,
    ring: RingParameters,
    seed: PublicSeed,
    options: CompileOptions,
    fan_in_fan_out: bool,
) -> PlanRecord:
    lora = options.lora
    literal = ring.to_literal()
    return PlanRecord(
        base_model=found_anywhere(base_model),
        public_seed=seed.hex(),
        ring=RingRecord(**dataclasses.asdict(literal)),
        lora=LoraRecord(
            r=lora.r,
            lora_alpha=float(lora.lora_alpha),
            lora_dropout=float(lora.lora_dropout),
            target_modules=list(lora.target_modules),
            fan_in_fan_out=fan_in_fan_out,
            layers_to_transform=None if lora.layers_to_transform is None else list(lora.layers_to_transform),
            layers_pattern=None if lora.layers_pattern is None else list(lora.layers_pattern),
        ),
        batch_size=options.batch_size,
        sequence_buckets=list(options.sequence_buckets),
        effective_bits=float(options.effective_bits),
        weight_bits=options.weight_bits,
        hints="none" if options.hints == "computed" else options.hints,
        graph_sha256=graph_sha256(plan.client),
        circuits={circuit.name: _circuit_record(circuit) for circuit in plan.circuits},
    )


def _circuit_record(circuit: RemoteCircuit) -> CircuitRecord:
    parameters, weight = circuit.parameters, circuit.weight
    return CircuitRecord(
        linear=circuit.linear,
        direction="forward" if circuit.direction == "forward" else "backward",
        in_features=parameters.in_features,
        out_features=parameters.out_features,
        max_l1=parameters.max_l1,
        max_l2=parameters.max_l2,
        upload_bits=parameters.upload_bits,
        reply_bits=parameters.reply_bits,
        noise_std=circuit.noise_std,
        effective_bits=round(circuit.effective_bits, 2),
        weight_sha256=hashlib.sha256(np.ascontiguousarray(weight).data).hexdigest(),
        weight_bits=weight_bits(weight),
        gain=None if circuit.largest_factor is None else parameters.gain,
        hint_bits=parameters.hint_bits if parameters.hint_bits < WORD_BITS else None,
    )


def _write_client(
    directory: Path,
    plan: SplitPlan,
    tokenizer: transformers.PreTrainedTokenizerBase,
    ends: frozenset[int],
    record: PlanRecord,
    hints: Iterable[FileRecord],
) -> None:
    directory.mkdir(exist_ok=True)
    ir.save(plan.client, directory / PLAN, external_data=PLAN_DATA)
    tokenizer.save_pretrained(directory / TOKENIZER)
    write_answer_ends(directory / TOKENIZER, ends)
    if record.hints == "fetched":
        write_manifest(directory, record, fetched=hints)
    else:
        write_manifest(directory, record, hints)
