"""From a checkpoint to the two bundles: export, the pipeline, hints, and everything written at once or not at all."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import transformers

from hecompile.bundles.client import (
    CHECKS,
    PLAN,
    PLAN_DATA,
    TOKENIZER,
    CircuitRecord,
    FileRecord,
    LoraRecord,
    PlanRecord,
    RingRecord,
    graph_sha256,
    write_manifest,
)
from hecompile.bundles.client import VERSION as CLIENT_VERSION
from hecompile.bundles.kinds import CLIENT, BundleKind
from hecompile.bundles.worker import VERSION as WORKER_VERSION
from hecompile.compiler.calibration import (
    _CALIBRATION_LENGTH,
    Samples,
    _self_sampler,
    sample_calibration_tokens,
)
from hecompile.compiler.circuit_writer import Progress, write_circuits, write_circuits_without_hints
from hecompile.compiler.frontend import export_onnx, load_checkpoint
from hecompile.compiler.pipeline import graph_steps, raise_steps, run_steps
from hecompile.compiler.polynomial_options import PolynomialOptions
from hecompile.compiler.staging import staging
from hecompile.compiler.target import check_target
from hecompile.errors import InputError
from hecompile.he.check_store import write_checks
from hecompile.he.parameters import CATALOGUE, RingParameters
from hecompile.he.random.sampling import PublicSeed, SecretRandom
from hecompile.he.verification import Checks
from hecompile.passes.approximation.approximate_rmsnorm import ApproximateRMSNorm
from hecompile.passes.approximation.approximate_silu import ApproximateSiLU
from hecompile.passes.approximation.approximate_softmax import ApproximateSoftmax
from hecompile.passes.approximation.calibrate import Calibrate
from hecompile.passes.approximation.quantize_activation import QuantizeActivation
from hecompile.passes.offload.attach_lora import AttachLora
from hecompile.passes.offload.place import Place, Policy
from hecompile.passes.offload.quantize import Quantize
from hecompile.passes.offload.select_parameters import SelectParameters, selected_ring
from hecompile.passes.offload.split import Split
from hecompile.passes.offload.validate import Validate
from hecompile.plan.circuits import RemoteCircuit, SplitPlan
from hecompile.plan.costs import CostModel


def _silent(what: str, done: int, total: int) -> None:
    return None


@dataclass(frozen=True)
class CompileOptions:
    """Everything that decides a plan. Raises InputError for a value out of range."""

    lora: AttachLora = field(default_factory=AttachLora)
    effective_bits: float = 8.0
    weight_bits: int = 10
    ring: str | None = None
    batch_size: int = 8
    sequence_buckets: tuple[int, ...] = (32, 64, 128)
    public_seed: PublicSeed | None = None
    policy: Policy = "offload"
    costs: CostModel = field(default_factory=CostModel)
    remote_head: bool = False
    stored_hints: bool = True
    """False: the client stores no hints, and the worker computes them with every product
    (`hecompile.bundles.public_rows`)."""
    attention: str | ApproximateSoftmax | None = None
    norm: str | ApproximateRMSNorm | None = None
    activation: str | ApproximateSiLU | QuantizeActivation | None = None
    """What stands for attention, RMSNorm and SiLU, by name (`hecompile.compiler.polynomial_options`) or with options;
    None: what the checkpoint was converted for, else the exact ones."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {self.batch_size}")
        buckets = self.sequence_buckets
        if not buckets or min(buckets) < 2 or list(buckets) != sorted(set(buckets)):
            raise InputError(f"sequence buckets must be increasing lengths of at least 2, got {list(buckets)}")
        if not 0.0 < self.effective_bits < math.inf:
            raise InputError(f"effective bits must be a positive number, got {self.effective_bits}")
        if self.ring is not None and self.ring not in CATALOGUE:
            raise InputError(f"ring {self.ring!r} cannot be selected; choose from {', '.join(CATALOGUE)}")
        Quantize(self.weight_bits, self.remote_head)  # refuses bits that it does not make, before a model is read
        self.polynomials()

    def polynomials(self, config: Any = None) -> PolynomialOptions:
        """What the plan of a checkpoint with this configuration replaces."""
        converted = PolynomialOptions.from_config(config)
        return converted.choosing(self.attention, self.norm, self.activation)

    def ring_parameters(self) -> RingParameters | None:
        return None if self.ring is None else CATALOGUE[self.ring]


def compile_checkpoint(
    model_name_or_path: str, out: Path, options: CompileOptions, progress: Progress = _silent
) -> str:
    """Compile a checkpoint into `out`/client and `out`/worker; returns the plan id.

    Deterministic for a given `options.public_seed`, but for the client's check vectors, which are secret. `out` may be
    missing, empty or an earlier build, which is replaced; it is left as it was if anything fails. Interrupted while it makes
    hints, it keeps those that are complete beside `out`, and the next call with the same arguments goes on from there
    (`hecompile.compiler.staging`). Raises HecompileError.
    """
    check_target(out, BundleKind.CLIENT)
    progress("load", 0, 1)
    checkpoint = load_checkpoint(model_name_or_path)
    name, tokenizer = checkpoint.name, checkpoint.tokenizer
    longest = getattr(checkpoint.model.config, "max_position_embeddings", options.sequence_buckets[-1])
    if options.sequence_buckets[-1] > longest:
        raise InputError(
            f"sequence bucket {options.sequence_buckets[-1]} is longer than the model's {longest} positions"
        )
    polynomials = options.polynomials(checkpoint.model.config)
    request = f"{CLIENT_VERSION} {WORKER_VERSION} {name} {options!r} {polynomials!r}"
    with staging(out, request, options.public_seed or PublicSeed.draw()) as stage:
        seed = stage.public_seed
        progress("export", 0, 1)
        model = export_onnx(checkpoint.model)
        progress("sample", 0, 1)
        length = options.sequence_buckets[-1] if polynomials else _CALIBRATION_LENGTH
        samples: Samples = (
            _self_sampler(checkpoint, seed, length)
            if polynomials.retrained
            else sample_calibration_tokens(checkpoint, seed, length)
        )
        # The graph holds the weights from here on, and lets go of each as it is quantised.
        del checkpoint
        gc.collect()  # the exporter's program is part of reference cycles
        plan, ring = lower(model, options, samples, lambda step: progress(step, 0, 1), polynomials)
        del model
        record = _plan_record(name, plan, ring, seed, options)
        write = write_circuits if options.stored_hints else write_circuits_without_hints
        hints = write(stage, plan, ring, record.plan_id(), progress)
        progress("checks", 0, 1)
        random = SecretRandom()
        for circuit in plan.circuits:
            weight = torch.from_numpy(circuit.weight).t()  # [out, in]
            write_checks(stage.build / CLIENT / CHECKS, circuit.name, Checks.draw(weight, random))
        progress("write", 0, 1)
        _write_client(stage.build / CLIENT, plan, tokenizer, record, hints)
    return record.plan_id()


def lower(
    model: ir.Model,
    options: CompileOptions,
    samples: Samples,
    on_step: Callable[[str], None] = lambda name: None,
    polynomials: PolynomialOptions | None = None,
) -> tuple[SplitPlan, RingParameters]:
    """Run the whole pipeline on an exported graph (consumed): the validated split plan and the ring chosen.

    `samples` for calibration, or what makes them from the canonical graph; `polynomials` default to what `options` name.
    """
    polynomials = options.polynomials() if polynomials is None else polynomials
    model = run_steps(model, raise_steps(polynomials), on_step)
    tokens = samples(model) if callable(samples) else samples
    select = SelectParameters(
        effective_bits=options.effective_bits,
        tokens=options.batch_size * options.sequence_buckets[-1],
        ring=options.ring_parameters(),
        costs=options.costs,
        stored_hints=options.stored_hints,
    )
    steps = graph_steps(
        options.lora,
        Calibrate(tokens),
        Quantize(options.weight_bits, options.remote_head),
        Place(options.policy, options.costs),
        select,
        polynomials,
    )
    model = run_steps(model, steps, on_step)
    on_step("split")
    ring = selected_ring(model)
    plan = Split()(model)
    on_step("validate")
    Validate(ring, options.effective_bits)(plan)
    return plan, ring


def _plan_record(
    base_model: str, plan: SplitPlan, ring: RingParameters, seed: PublicSeed, options: CompileOptions
) -> PlanRecord:
    lora = options.lora
    literal = ring.to_literal()
    return PlanRecord(
        base_model=base_model,
        public_seed=seed.hex(),
        ring=RingRecord(**dataclasses.asdict(literal)),
        lora=LoraRecord(
            r=lora.r,
            lora_alpha=float(lora.lora_alpha),
            lora_dropout=float(lora.lora_dropout),
            target_modules=list(lora.target_modules),
        ),
        batch_size=options.batch_size,
        sequence_buckets=list(options.sequence_buckets),
        effective_bits=float(options.effective_bits),
        weight_bits=options.weight_bits,
        hints="stored" if options.stored_hints else "none",
        graph_sha256=graph_sha256(plan.client),
        circuits={circuit.name: _circuit_record(circuit) for circuit in plan.circuits},
    )


def _circuit_record(circuit: RemoteCircuit) -> CircuitRecord:
    parameters = circuit.parameters
    return CircuitRecord(
        linear=circuit.linear,
        direction="forward" if circuit.direction == "forward" else "backward",
        in_features=parameters.in_features,
        out_features=parameters.out_features,
        max_l1=parameters.max_l1,
        max_l2=parameters.max_l2,
        upload_limbs=parameters.upload_limbs,
        reply_bytes=parameters.reply_bytes,
        noise_std=circuit.noise_std,
        effective_bits=round(circuit.effective_bits, 2),
        weight_sha256=hashlib.sha256(np.ascontiguousarray(circuit.weight).data).hexdigest(),
    )


def _write_client(
    directory: Path,
    plan: SplitPlan,
    tokenizer: transformers.PreTrainedTokenizerBase,
    record: PlanRecord,
    hints: Iterable[FileRecord],
) -> None:
    ir.save(plan.client, directory / PLAN, external_data=PLAN_DATA)
    tokenizer.save_pretrained(directory / TOKENIZER)
    write_manifest(directory, record, hints)
