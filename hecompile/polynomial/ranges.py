"""What calibration records for the polynomials that replace attention, normalisation and activation, and the rule that a
calibrated range must lie within the domain of what stands in the graph."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from hecompile.errors import LegalityError
from hecompile.graph.ir import APPROXIMATION_RANGE, attributes_of, module_path
from hecompile.graph.polynomial_operators import attention_scores, gaussian_exponents

POWERS = (2, 4, 6, 8)
NORMS, ACTIVATIONS = ("RMSNorm", "PolynomialRMSNorm"), ("SiLU", "PolynomialSiLU", "ComposedSiLU", "QuantizedSiLU")


@dataclass(frozen=True)
class Interval:
    """The smallest and the largest value seen."""

    lower: float
    upper: float

    @classmethod
    def of(cls, values: Tensor) -> Interval:
        return cls(float(values.min()), float(values.max()))

    def widened(self, margin: float) -> Interval:
        """Of positive values: both ends moved apart by a factor."""
        return Interval(self.lower / margin, self.upper * margin)

    def within(self, lower: float, upper: float) -> bool:
        """Whether it lies in [lower, upper], up to the rounding of float32."""
        slack = 1e-6
        return self.lower >= lower - slack * abs(lower) and self.upper <= upper + slack * abs(upper)


@dataclass(frozen=True)
class AttentionRange:
    """Over every query, head and position of the sample: the scores t = q·kᵀ·scale of keys that are seen, the exponents
    -‖q - k‖²·scale/2, log Σ exp(t) of a query, the sums and means over its keys of t^p (p = 2, 4, 6, 8), and the same sums
    and means after t was divided by the query's largest |t|."""

    length: int
    scores: Interval
    exponents: Interval
    log_sums: Interval
    power_sums: dict[str, Interval]
    power_means: dict[str, Interval]
    stable_sums: dict[str, Interval]

    @classmethod
    def measure(cls, q: Tensor, k: Tensor, bias: Tensor, scale: float) -> AttentionRange:
        """q and k [B, heads, S, D], bias broadcast to [B, heads, S, S]; a query with zero scores only has sums of zero."""
        scores = attention_scores(q, k, scale)  # [B, heads, S, S]
        mask = torch.exp(bias).expand_as(scores)
        seen = mask > 0
        visible = mask.sum(-1)  # [B, heads, S]
        stable = scores / (scores * mask).abs().amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)

        def sums(values: Tensor, divisor: Tensor | float = 1.0) -> dict[str, Interval]:
            return {str(p): Interval.of((values.pow(p) * mask).sum(-1) / divisor) for p in POWERS}

        return cls(
            length=scores.shape[-1],
            scores=Interval.of(scores[seen]),
            exponents=Interval.of(gaussian_exponents(q, k, scale)[seen]),
            log_sums=Interval.of(torch.logsumexp(scores + bias, -1)),
            power_sums=sums(scores),
            power_means=sums(scores, visible),
            stable_sums=sums(stable),
        )


def write_range(value: ir.Value, found: Interval | AttentionRange) -> None:
    """Record `found` on the result that a polynomial would make."""
    value.metadata_props[APPROXIMATION_RANGE] = json.dumps(_rounded(asdict(found)))


def interval_of(value: ir.Value) -> Interval | None:
    """The variances of an RMSNorm or the inputs of a SiLU, as recorded; None without calibration."""
    raw = value.metadata_props.get(APPROXIMATION_RANGE)
    return None if raw is None else Interval(**json.loads(raw))


def attention_range_of(value: ir.Value) -> AttentionRange | None:
    """What was recorded of an attention; None without calibration."""
    raw = value.metadata_props.get(APPROXIMATION_RANGE)
    if raw is None:
        return None
    found = json.loads(raw)
    fields: dict[str, Any] = {name: Interval(**found[name]) for name in ("scores", "exponents", "log_sums")}
    for name in ("power_sums", "power_means", "stable_sums"):
        fields[name] = {power: Interval(**interval) for power, interval in found[name].items()}
    return AttentionRange(length=found["length"], **fields)


def _rounded(found: object) -> object:
    """Floats to six digits: the last ones differ between machines."""
    if isinstance(found, dict):
        return {name: _rounded(value) for name, value in found.items()}
    return float(f"{found:.6g}") if isinstance(found, float) else found


def check_domain(node: ir.Node) -> None:
    """LegalityError when what calibration saw leaves the domain that the polynomial `node` was made for."""
    if APPROXIMATION_RANGE not in node.outputs[0].metadata_props or "error_bound" not in node.attributes:
        return
    output = node.outputs[0]
    found = interval_of(output) if node.op_type in (*NORMS, *ACTIVATIONS) else attention_range_of(output)
    assert found is not None
    for what, seen, lower, upper in demands(node, found):
        require_within(module_path(node) or str(output.name), what, seen, lower, upper)


def demands(node: ir.Node, found: Interval | AttentionRange) -> list[tuple[str, Interval, float, float]]:
    """What must lie where, of what went into the polynomial `node`: (name, seen, lower, upper)."""
    given = attributes_of(node)
    numbers = {name: float(value) for name, value in given.items() if isinstance(value, (int, float))}
    if isinstance(found, Interval):
        what = "the variance" if node.op_type in NORMS else "the input"
        return [(what, found, numbers["domain_lower"], numbers["domain_upper"])]
    if node.op_type == "GaussianAttention":
        # ‖q - k‖² is computed from three sums: rounding may leave it a little below zero.
        exponents = Interval(found.exponents.lower, min(found.exponents.upper, 0.0))
        return [("the exponent", exponents, numbers["domain_lower"], numbers["domain_upper"])]
    if node.op_type == "ChebyshevAttention":
        shift = numbers["shift"]
        shifted = Interval(found.scores.lower - shift, found.scores.upper - shift)
        demands = [("the score less its shift", shifted, numbers["domain_lower"], numbers["domain_upper"])]
        if numbers["halvings"]:
            demands.append(("the number of keys", Interval(1, found.length), 1, 1 / numbers["square_lower"]))
        return demands
    demands = [("the score", found.scores, -numbers["domain_upper"], numbers["domain_upper"])]
    if given["division"] == "goldschmidt":
        divisor = divisor_range(found, str(given["form"]), int(numbers["power"]), numbers["epsilon"])
        demands.append(("the divisor", divisor, numbers["ratio_lower"], numbers["ratio_upper"]))
    return demands


def divisor_range(found: AttentionRange, form: str, power: int, epsilon: float) -> Interval:
    """The divisors ε + Σ or ε + mean of a power attention."""
    table = {"stable": found.stable_sums, "lipschitz": found.power_sums, "length_agnostic": found.power_means}[form]
    if str(power) not in table:
        raise LegalityError(f"calibration records powers {', '.join(map(str, POWERS))}, not {power}")
    return Interval(table[str(power)].lower + epsilon, table[str(power)].upper + epsilon)


def require_within(where: str, what: str, seen: Interval, lower: float, upper: float) -> None:
    """LegalityError with the numbers when `seen` leaves [lower, upper]."""
    if not seen.within(lower, upper):
        raise LegalityError(
            f"{where}: {what} was seen between {seen.lower:.6g} and {seen.upper:.6g}, outside the domain [{lower:.6g}, "
            f"{upper:.6g}] of its polynomial; widen the domain (which costs depth), or train the model into it with a "
            "heavier range loss"
        )
