"""Name every pass and run them in order, from an exported graph to a plan.

Read it from the top: how both pipelines begin (`approximate`), the plan of linears (`lower_linear`, `lower_circuit`) and the
polynomial plan (`lower_polynomial`). The stage beside each pass says what is legal after it (`hecompile.graph.legality`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import onnx_ir as ir

from hecompile.ckks.parameters import CkksLiteral, CkksParameters, select
from hecompile.compiler.options import CkksOptions, CompileOptions
from hecompile.compiler.polynomial_options import PolynomialOptions
from hecompile.errors import HecompileError, LegalityError
from hecompile.graph.head import head_shape, keep_head_digest
from hecompile.graph.ir import ATTENTION_BIAS, SLIDING_BIAS
from hecompile.graph.lazy import Keep, KeepRows, in_memory, rows_in_memory
from hecompile.graph.legality import (
    ADAPTED,
    CANONICAL,
    CLIENT_PLAN,
    EXPORTED,
    POLYNOMIAL,
    QUANTIZED,
    REFRESHED,
    Stage,
    check_stage,
)
from hecompile.graph.matching import require_matched_attention
from hecompile.he.parameters import RingParameters
from hecompile.passes.approximation.approximate_rmsnorm import ApproximateRMSNorm
from hecompile.passes.approximation.approximate_silu import ApproximateSiLU
from hecompile.passes.approximation.approximate_softmax import ApproximateSoftmax
from hecompile.passes.approximation.calibrate import Calibrate, Samples
from hecompile.passes.approximation.quantize_activation import QuantizeActivation
from hecompile.passes.offload.annotate_secrecy import AnnotateSecrecy
from hecompile.passes.offload.attach_lora import AttachLora
from hecompile.passes.offload.cut_prefix import CutPrefix
from hecompile.passes.offload.cut_wide import CutWide
from hecompile.passes.offload.fuse import Fuse
from hecompile.passes.offload.lower_worker import LowerWorker
from hecompile.passes.offload.narrow import Narrow
from hecompile.passes.offload.place import Place
from hecompile.passes.offload.quantize import Quantize
from hecompile.passes.offload.rotate import Rotate
from hecompile.passes.offload.route_experts import RouteExperts, has_experts
from hecompile.passes.offload.select_parameters import SelectParameters, selected_ring
from hecompile.passes.offload.select_weight_bits import SelectWeightBits
from hecompile.passes.offload.split import Split
from hecompile.passes.offload.stack_projections import StackProjections
from hecompile.passes.offload.validate import Validate
from hecompile.passes.polynomial.depth import METADATA as DEPTH
from hecompile.passes.polynomial.depth import Depth
from hecompile.passes.polynomial.expand_polynomials import ExpandPolynomials
from hecompile.passes.polynomial.place_refreshes import PlaceRefreshes
from hecompile.passes.raising.canonicalize import Canonicalize
from hecompile.passes.raising.simplify import Simplify
from hecompile.passes.raising.unify import Unify
from hecompile.plan.circuits import SplitPlan
from hecompile.plan.hint_bits import with_hint_bits

PASSES: dict[str, type] = {
    "simplify": Simplify,
    "unify": Unify,
    "canonicalize": Canonicalize,
    "approximate_softmax": ApproximateSoftmax,
    "approximate_rmsnorm": ApproximateRMSNorm,
    "approximate_silu": ApproximateSiLU,
    "quantize_activation": QuantizeActivation,
    "attach_lora": AttachLora,
    "rotate": Rotate,
    "calibrate": Calibrate,
    "select_weight_bits": SelectWeightBits,
    "quantize": Quantize,
    "annotate_secrecy": AnnotateSecrecy,
    "place": Place,
    "route_experts": RouteExperts,
    "stack_projections": StackProjections,
    "cut_wide": CutWide,
    "select_parameters": SelectParameters,
    "split": Split,
    "narrow": Narrow,
    "lower_worker": LowerWorker,
    "validate": Validate,
    "fuse": Fuse,
    "cut_prefix": CutPrefix,
    "expand_polynomials": ExpandPolynomials,
    "depth": Depth,
    "place_refreshes": PlaceRefreshes,
}
"""Every pass by its registered name. `fuse` runs when a client loads its half of a plan, `cut_prefix` when it keeps some."""

OnStep = Callable[[str], None]
"""Receives the name of a step before it runs."""


def _silent(name: str) -> None:
    return None


def run_step(
    model: ir.Model, name: str, transform: ir.passes.PassBase, stage: Stage, on_step: OnStep = _silent
) -> ir.Model:
    """Run one pass and check that its result is legal at `stage`.

    Raises the HecompileError of the pass; any other broken invariant becomes a LegalityError that names the pass.
    """
    on_step(name)
    try:
        model = transform(model).model
    except ir.passes.InvariantError as error:
        cause = error.__cause__
        if isinstance(cause, HecompileError):
            raise cause from error
        raise LegalityError(f"pass {name}: {error}") from error
    check_stage(model, stage)
    return model


def approximate(
    model: ir.Model,
    polynomials: PolynomialOptions | None = None,
    calibrate: Calibrate | None = None,
    on_step: OnStep = _silent,
) -> ir.Model:
    """Raise an exported graph to the model's own operators and replace the chosen ones: how both pipelines begin.

    Calibration runs the functions that the model was trained for, so that the domains of the polynomials cover what it
    saw. Without `calibrate` each polynomial has the domain that its options give.
    """
    polynomials = polynomials or PolynomialOptions()
    attention, norm, activation = polynomials.attention, polynomials.norm, polynomials.activation
    run = partial(run_step, on_step=on_step)
    model = run(model, "simplify", Simplify(), EXPORTED)
    model = run(model, "unify", Unify(), EXPORTED)
    model = run(model, "canonicalize", Canonicalize(), CANONICAL)
    if (trained := polynomials.trained_attention()) is not None:
        model = run(model, "approximate_softmax", trained, CANONICAL)
    if calibrate is not None and polynomials:
        model = run(model, "calibrate", calibrate, CANONICAL)
    if attention is not None:
        model = run(model, "approximate_softmax", attention, CANONICAL)
    if norm is not None:
        model = run(model, "approximate_rmsnorm", norm, CANONICAL)
    if isinstance(activation, QuantizeActivation):
        model = run(model, "quantize_activation", activation, CANONICAL)
    elif activation is not None:
        model = run(model, "approximate_silu", activation, CANONICAL)
    return model


def lower_linear(
    model: ir.Model,
    options: CompileOptions,
    samples: Samples,
    on_step: OnStep = _silent,
    polynomials: PolynomialOptions | None = None,
    keep: Keep = in_memory,
    keep_rows: KeepRows = rows_in_memory,
) -> tuple[SplitPlan, RingParameters]:
    """Lower an exported graph (consumed) to the plan of linears: the validated split plan and the ring chosen.

    samples: for calibration. polynomials: default to those that `options` name. keep, keep_rows: where integers and the rows
    that calibration saw go.
    """
    polynomials = options.polynomials() if polynomials is None else polynomials
    run = partial(run_step, on_step=on_step)
    model = approximate(model, polynomials, Calibrate(samples), on_step)
    if polynomials.attention is None:
        require_matched_attention(model, (ATTENTION_BIAS, SLIDING_BIAS))
    options = options.deciding_head(head_shape(model))
    if options.remote_head:
        keep_head_digest(model)
    model = run(model, "attach_lora", options.lora, ADAPTED)
    model = run(model, "rotate", Rotate(options.remote_head), ADAPTED)
    model = run(model, "calibrate", Calibrate(samples, keep_samples=True, keep_rows=keep_rows), ADAPTED)
    if options.weight_bits == "auto":
        model = run(model, "select_weight_bits", options.select_weight_bits(), ADAPTED)
    model = run(model, "quantize", dataclasses.replace(options.quantize(), keep=keep), QUANTIZED)
    model = run(model, "annotate_secrecy", AnnotateSecrecy(), QUANTIZED)
    model = run(model, "place", Place(options.policy, options.costs), QUANTIZED)
    if options.experts == "routed" and has_experts(model):
        model = run(model, "route_experts", RouteExperts(), QUANTIZED)
    model = run(model, "stack_projections", StackProjections(), QUANTIZED)
    model = run(model, "cut_wide", CutWide(), QUANTIZED)
    model = run(model, "select_parameters", options.select_parameters(), QUANTIZED)
    ring = selected_ring(model)
    on_step("split")
    plan = Split()(model)
    run(plan.client, "narrow", Narrow(), CLIENT_PLAN)
    if options.hints != "computed":
        plan = with_hint_bits(plan, options.effective_bits)
    on_step("validate")
    Validate(ring, options.effective_bits)(plan)
    return plan, ring  # the worker's circuits go through `lower_circuit` one by one, as they are written


def lower_circuit(circuit: ir.Model) -> ir.Model:
    """Lower a circuit of a split plan to plain integer ONNX: the last step of the plan of linears.

    It runs as a circuit is written, so that memory holds the bytes of one weight. LowerWorker checks what is legal.
    """
    return LowerWorker()(circuit).model


def lower_polynomial(
    model: ir.Model,
    options: CkksOptions,
    polynomials: PolynomialOptions,
    samples: Samples,
    on_step: OnStep = _silent,
) -> tuple[ir.Model, CkksParameters, int]:
    """Lower an exported graph (consumed) to the polynomial plan, which a worker evaluates alone on ciphertexts.

    Returns the graph at stage `refreshed`, parameters that have its levels, and the depth that it has without refreshes.
    """
    run = partial(run_step, on_step=on_step)
    model = approximate(model, polynomials, Calibrate(samples), on_step)
    expand = ExpandPolynomials(options.sequence_length, options.last_only)
    model = run(model, "expand_polynomials", expand, POLYNOMIAL)
    model = run(model, "depth", Depth(), POLYNOMIAL)
    depth = int(model.metadata_props[DEPTH])
    levels = options.levels or depth
    parameters = select(levels) if options.ring_dim is None else CkksLiteral(options.ring_dim, levels).validate()
    model = run(model, "place_refreshes", PlaceRefreshes(levels), REFRESHED)
    model = run(model, "depth", Depth(parameters.literal.scale_bits), REFRESHED)
    return model, parameters, depth
