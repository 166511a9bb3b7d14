"""Record the ranges that polynomials must cover, and check that they lie within the domains of those in the graph."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from hecompile.errors import LegalityError
from hecompile.graph.ir import APPROXIMATION_RANGE, attributes_of, module_path
from hecompile.polynomial.inputs import ACTIVATIONS, NORMS, AttentionInputs, is_approximated

POWERS = (2, 4, 6, 8)


@dataclass(frozen=True)
class Interval:
    """Represent a range by its smallest and largest value."""

    lower: float
    upper: float

    @classmethod
    def of(cls, values: Tensor) -> Interval:
        """Return the range of the entries of `values`; NaN at both ends where one of them is NaN."""
        values = values.detach()
        return cls(float(values.min()), float(values.max()))

    def joined(self, other: Interval) -> Interval:
        """Return the smallest range that holds both; NaN stays NaN."""
        return Interval.of(torch.tensor([self.lower, self.upper, other.lower, other.upper], dtype=torch.float64))

    def widened(self, margin: float) -> Interval:
        """Return this range of positive values with both ends moved apart by the factor `margin`."""
        return Interval(self.lower / margin, self.upper * margin)

    def within(self, lower: float, upper: float) -> bool:
        """Tell whether it lies in [lower, upper], up to the rounding of float32."""
        slack = 1e-6
        return self.lower >= lower - slack * abs(lower) and self.upper <= upper + slack * abs(upper)


@dataclass(frozen=True)
class AttentionRange:
    """Hold the ranges that any polynomial attention must cover, over every query, head and position of a sample.

    Attributes:
        length: keys of the longest query.
        scores: t = q·kᵀ·scale of visible keys.
        exponents: -‖q - k‖²·scale/2 of visible keys.
        log_sums: log Σ exp(t) of a query.
        power_sums, power_means: sum and mean over a query's keys of t^p, by p = 2, 4, 6, 8.
        stable_sums: power_sums after t was divided by the query's largest |t|.
    """

    length: int
    scores: Interval
    exponents: Interval
    log_sums: Interval
    power_sums: dict[str, Interval]
    power_means: dict[str, Interval]
    stable_sums: dict[str, Interval]

    @classmethod
    def measure(cls, inputs: AttentionInputs) -> AttentionRange:
        """Return the ranges of an attention's inputs; a query whose scores are all zero has sums of zero."""
        scores = inputs.scores  # [B, heads, S, S]
        mask = inputs.mask.expand_as(scores)
        keys = mask.sum(-1)  # [B, heads, S]
        stable = scores / (scores * mask).abs().amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)

        def sums(values: Tensor, divisor: Tensor | float = 1.0) -> dict[str, Interval]:
            return {str(p): Interval.of((values.pow(p) * mask).sum(-1) / divisor) for p in POWERS}

        return cls(
            length=scores.shape[-1],
            scores=Interval.of(inputs.visible(scores)),
            exponents=Interval.of(inputs.visible(inputs.exponents)),
            log_sums=Interval.of(torch.logsumexp(scores + inputs.bias, -1)),
            power_sums=sums(scores),
            power_means=sums(scores, keys),
            stable_sums=sums(stable),
        )


def range_of(inputs: AttentionInputs | Tensor) -> Interval | AttentionRange:
    """Return the range of what an `InputRecorder` received: of an attention, or of variances or activation inputs."""
    return AttentionRange.measure(inputs) if isinstance(inputs, AttentionInputs) else Interval.of(inputs)


def write_range(value: ir.Value, measured: Interval | AttentionRange) -> None:
    """Record a range on the result that a polynomial would make, as JSON with six digits."""
    value.metadata_props[APPROXIMATION_RANGE] = json.dumps(_rounded(asdict(measured)))


def interval_of(value: ir.Value) -> Interval | None:
    """Return the recorded range of the variances of an RMSNorm or the inputs of a SiLU; None without calibration."""
    raw = value.metadata_props.get(APPROXIMATION_RANGE)
    return None if raw is None else Interval(**json.loads(raw))


def attention_range_of(value: ir.Value) -> AttentionRange | None:
    """Return the recorded ranges of an attention; None without calibration."""
    raw = value.metadata_props.get(APPROXIMATION_RANGE)
    if raw is None:
        return None
    recorded = json.loads(raw)
    fields: dict[str, Any] = {name: Interval(**recorded[name]) for name in ("scores", "exponents", "log_sums")}
    for name in ("power_sums", "power_means", "stable_sums"):
        fields[name] = {power: Interval(**interval) for power, interval in recorded[name].items()}
    return AttentionRange(length=recorded["length"], **fields)


def _rounded(document: object) -> object:
    """Round all floats to six digits: the last ones differ between machines."""
    if isinstance(document, dict):
        return {name: _rounded(value) for name, value in document.items()}
    return float(f"{document:.6g}") if isinstance(document, float) else document


@dataclass(frozen=True)
class DomainCheck:
    """Compare the range of one input of a polynomial, e.g. "the variance", with the domain that it must lie in."""

    what: str
    seen: Interval
    domain: Interval

    @property
    def passed(self) -> bool:
        return self.seen.within(self.domain.lower, self.domain.upper)


def check_domain(node: ir.Node) -> None:
    """Raise LegalityError when a calibrated range leaves the domain that the polynomial `node` was made for."""
    output = node.outputs[0]
    if APPROXIMATION_RANGE not in output.metadata_props or not is_approximated(node):
        return
    recorded = interval_of(output) if node.op_type in (*NORMS, *ACTIVATIONS) else attention_range_of(output)
    assert recorded is not None
    for check in domain_checks(node, recorded):
        where, domain = module_path(node) or str(output.name), check.domain
        require_within(where, check.what, check.seen, domain.lower, domain.upper)


def domain_checks(node: ir.Node, measured: Interval | AttentionRange) -> list[DomainCheck]:
    """Return every input of the polynomial `node` with its measured range and its domain."""
    attributes = attributes_of(node)
    numbers = {name: float(value) for name, value in attributes.items() if isinstance(value, (int, float))}

    def domain(name: str) -> Interval:
        return Interval(numbers[f"{name}_lower"], numbers[f"{name}_upper"])

    if isinstance(measured, Interval):
        return [DomainCheck("the variance" if node.op_type in NORMS else "the input", measured, domain("domain"))]
    if node.op_type == "GaussianAttention":
        # ‖q - k‖² is computed from three sums: rounding may leave it a little below zero.
        exponents = Interval(measured.exponents.lower, min(measured.exponents.upper, 0.0))
        return [DomainCheck("the exponent", exponents, domain("domain"))]
    if node.op_type == "ChebyshevAttention":
        shift = numbers["shift"]
        shifted = Interval(measured.scores.lower - shift, measured.scores.upper - shift)
        checks = [DomainCheck("the score less its shift", shifted, domain("domain"))]
        if numbers["halvings"]:
            keys = Interval(1, measured.length)
            checks.append(DomainCheck("the number of keys", keys, Interval(1, 1 / numbers["square_lower"])))
        return checks
    bound = numbers["domain_upper"]
    checks = [DomainCheck("the score", measured.scores, Interval(-bound, bound))]
    if attributes["division"] == "goldschmidt":
        divisors = divisor_range(measured, str(attributes["form"]), int(numbers["power"]), numbers["epsilon"])
        checks.append(DomainCheck("the divisor", divisors, domain("ratio")))
    return checks


def divisor_range(measured: AttentionRange, form: str, power: int, epsilon: float) -> Interval:
    """Return the range of the divisors ε + Σ or ε + mean of a power attention.

    Raises LegalityError for a power that calibration does not record.
    """
    tables = {"stable": measured.stable_sums, "lipschitz": measured.power_sums, "length_agnostic": measured.power_means}
    sums = tables[form].get(str(power))
    if sums is None:
        raise LegalityError(f"calibration records powers {', '.join(map(str, POWERS))}, not {power}")
    return Interval(sums.lower + epsilon, sums.upper + epsilon)


def require_within(where: str, what: str, seen: Interval, lower: float, upper: float) -> None:
    """Raise LegalityError, with the numbers, when the range `seen` of `what` leaves a domain [lower, upper]."""
    if not seen.within(lower, upper):
        raise LegalityError(
            f"{where}: {what} was seen between {seen.lower:.6g} and {seen.upper:.6g}, outside the domain [{lower:.6g}, "
            f"{upper:.6g}] of its polynomial; widen the domain (which costs depth), or train the model into it with a "
            "heavier range loss"
        )
