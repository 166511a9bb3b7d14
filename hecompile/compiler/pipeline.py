"""The pipeline: the ordered list of passes from an exported graph to a split plan, with what is legal in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from hecompile.compiler.polynomial_options import PolynomialOptions
from hecompile.errors import HecompileError, LegalityError
from hecompile.graph.legality import ADAPTED, CANONICAL, EXPORTED, POLYNOMIAL, QUANTIZED, REFRESHED, Stage, check_stage
from hecompile.passes.approximation.approximate_rmsnorm import ApproximateRMSNorm
from hecompile.passes.approximation.approximate_silu import ApproximateSiLU
from hecompile.passes.approximation.approximate_softmax import ApproximateSoftmax
from hecompile.passes.approximation.calibrate import Calibrate
from hecompile.passes.approximation.quantize_activation import QuantizeActivation
from hecompile.passes.offload.annotate_secrecy import AnnotateSecrecy
from hecompile.passes.offload.attach_lora import AttachLora
from hecompile.passes.offload.fuse import Fuse
from hecompile.passes.offload.lower_worker import LowerWorker
from hecompile.passes.offload.place import Place
from hecompile.passes.offload.quantize import Quantize
from hecompile.passes.offload.select_parameters import SelectParameters
from hecompile.passes.offload.split import Split
from hecompile.passes.offload.stack_projections import StackProjections
from hecompile.passes.offload.validate import Validate
from hecompile.passes.polynomial.depth import Depth
from hecompile.passes.polynomial.expand_polynomials import ExpandPolynomials
from hecompile.passes.polynomial.place_refreshes import PlaceRefreshes
from hecompile.passes.raising.canonicalize import Canonicalize
from hecompile.passes.raising.simplify import Simplify

PASSES: dict[str, type] = {
    "simplify": Simplify,
    "canonicalize": Canonicalize,
    "approximate_softmax": ApproximateSoftmax,
    "approximate_rmsnorm": ApproximateRMSNorm,
    "approximate_silu": ApproximateSiLU,
    "quantize_activation": QuantizeActivation,
    "attach_lora": AttachLora,
    "calibrate": Calibrate,
    "quantize": Quantize,
    "annotate_secrecy": AnnotateSecrecy,
    "place": Place,
    "stack_projections": StackProjections,
    "select_parameters": SelectParameters,
    "split": Split,
    "lower_worker": LowerWorker,
    "validate": Validate,
    "fuse": Fuse,
    "expand_polynomials": ExpandPolynomials,
    "depth": Depth,
    "place_refreshes": PlaceRefreshes,
}
"""Every pass by its registered name, in pipeline order; split, lower_worker and validate work on the split plan, and fuse
runs when a client loads its half; expand_polynomials and what follows it make the graph that a worker evaluates alone."""


_EXACT = PolynomialOptions()


@dataclass(frozen=True)
class Step:
    """A pass with its options, and the stage that its result must be legal at."""

    name: str
    transform: ir.passes.PassBase
    stage: Stage


def raise_steps(polynomials: PolynomialOptions = _EXACT) -> tuple[Step, ...]:
    """Up to the graph of the model's own operators; attention computes the function that the model was trained for."""
    steps = [Step("simplify", Simplify(), EXPORTED), Step("canonicalize", Canonicalize(), CANONICAL)]
    if polynomials.attention is not None and polynomials.retrained:
        steps.append(Step("approximate_softmax", replace(polynomials.attention, fit=False), CANONICAL))
    return tuple(steps)


def approximate_steps(calibrate: Calibrate, polynomials: PolynomialOptions) -> tuple[Step, ...]:
    """Calibration on exact functions, then polynomials whose domains cover what it saw; none where nothing is replaced."""
    chosen = {
        "approximate_softmax": polynomials.attention,
        "approximate_rmsnorm": polynomials.norm,
        _activation_pass(polynomials): polynomials.activation,
    }
    steps = [Step(name, transform, CANONICAL) for name, transform in chosen.items() if transform is not None]
    return (Step("calibrate", calibrate, CANONICAL), *steps) if steps else ()


def _activation_pass(polynomials: PolynomialOptions) -> str:
    return "quantize_activation" if isinstance(polynomials.activation, QuantizeActivation) else "approximate_silu"


def graph_steps(
    attach_lora: AttachLora,
    calibrate: Calibrate,
    quantize: Quantize,
    place: Place,
    select_parameters: SelectParameters,
    polynomials: PolynomialOptions = _EXACT,
) -> tuple[Step, ...]:
    """The graph-to-graph part of the pipeline after `raise_steps`."""
    return (
        *approximate_steps(calibrate, polynomials),
        Step("attach_lora", attach_lora, ADAPTED),
        Step("calibrate", calibrate, ADAPTED),
        Step("quantize", quantize, QUANTIZED),
        Step("annotate_secrecy", AnnotateSecrecy(), QUANTIZED),
        Step("place", place, QUANTIZED),
        Step("stack_projections", StackProjections(), QUANTIZED),
        Step("select_parameters", select_parameters, QUANTIZED),
    )


def polynomial_steps(expand: ExpandPolynomials) -> tuple[Step, ...]:
    """An approximated graph to sums and products, and how deep they are."""
    return (Step("expand_polynomials", expand, POLYNOMIAL), Step("depth", Depth(), POLYNOMIAL))


def refresh_steps(place_refreshes: PlaceRefreshes, bits_per_level: int) -> tuple[Step, ...]:
    """Refreshes where the levels of chosen parameters run out, and the depth between them."""
    depth = Depth(bits_per_level, place_refreshes.masks_are_free)
    return (Step("place_refreshes", place_refreshes, REFRESHED), Step("depth", depth, REFRESHED))


def run_steps(model: ir.Model, steps: Sequence[Step], on_step: Callable[[str], None] = lambda name: None) -> ir.Model:
    """Run the passes in order, each followed by its legality check. `on_step` hears each name before the pass runs.

    Raises the HecompileError of the pass that failed; any other invariant becomes a LegalityError that names the pass.
    """
    for step in steps:
        on_step(step.name)
        try:
            model = step.transform(model).model
        except ir.passes.InvariantError as error:
            cause = error.__cause__
            if isinstance(cause, HecompileError):
                raise cause from error
            raise LegalityError(f"pass {step.name}: {error}") from error
        check_stage(model, step.stage)
    return model
