"""Replace every softmax attention by one that needs only sums and products.

    MatMul(Softmax(Add(Mul(MatMul(q, kᵀ), c), bias)), v)
        power            →  PowerAttention(q, k, v, bias; scale = c, …)
        gaussian_kernel  →  GaussianAttention(q, k, v, bias; scale = c, …)
        chebyshev        →  ChebyshevAttention(q, k, v, bias; scale = c, …)

`power`: t^p / (ε + Σ t^p), another function than softmax, which a model must be trained for (Zimerman et al., Power-Softmax,
arXiv 2410.09457, the stable, Lipschitz and length-agnostic forms). `gaussian_kernel`: exp(-‖q - k‖²/(2√d)), not divided,
also to be trained for (Rho et al., arXiv 2410.02486). `chebyshev`: softmax itself: the softmax of scores halved k times,
for which exp has a narrow domain, then k times squared and divided by its sum (Cho et al., CCS 2024, arXiv 2410.11184).
The mask is a factor 0 or 1; for the Gaussian kernel it stands in the exponent, which for constants 0 and 1 is the same.

Error bounds, over the domain: `power` with Goldschmidt's division, the relative error of the quotient ρ^(2^n)
(`hecompile.approximation.goldschmidt`), with exact division none; `gaussian_kernel`, of a weight, max(4/(e²·2^k), …)
(`hecompile.approximation.exponential`); `chebyshev`, of the sum over the keys of a weight's error: R - 1 + ρ^(2^n), with
R = ((1 + η)/(1 - η))^(2^k) for a series of relative error η, since a division's error is common to a query's weights and the
next division takes it away again. Iterations, squarings and degree are the fewest that reach `error`.
A node that the pass made without calibration (`fit=False`) is fitted when the pass runs again after calibration.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import onnx_ir as ir

from hecompile.approximation import exponential, goldschmidt
from hecompile.errors import InputError, LegalityError
from hecompile.graph.ir import (
    DOMAIN,
    ORIGIN,
    attribute,
    module_path,
    nodes_of_type,
    remove_unused,
    replace_node,
    single,
)
from hecompile.graph.matching import AttentionParts, attentions
from hecompile.polynomial.ranges import (
    POWERS,
    AttentionRange,
    Interval,
    attention_range_of,
    divisor_range,
    require_within,
)

Variant = Literal["power", "gaussian_kernel", "chebyshev"]
Form = Literal["stable", "lipschitz", "length_agnostic"]
Division = Literal["exact", "goldschmidt"]
_WIDEST_EXPONENTS = 6.0
"""Scores are halved until exp has a domain no wider: its relative error is then that of a series of low degree."""
_OPERATORS = {"power": "PowerAttention", "gaussian_kernel": "GaussianAttention", "chebyshev": "ChebyshevAttention"}


@dataclass(frozen=True)
class ApproximateSoftmax(ir.passes.InPlacePass):
    """Replace softmax attentions by the variant that these options choose.

    variant, and for `power`: power (even), form, epsilon (in the divisor), delta (stable form), division.
    error: the bound wanted. margin: factor by which a domain exceeds the calibrated range.
    domain_lower, domain_upper: the domain of the exponents (gaussian_kernel, domain_lower < 0) or scores (power: of |t|,
    domain_upper); ratio_lower, ratio_upper: of the divisors. None: from calibration. Given, calibration must stay within.
    length: most keys of a query (chebyshev); None: the calibration's. max_degree, max_iterations: more is refused.
    fit: False makes the exact function of the variant, without a domain, for calibration to run on.

    Raises InputError for options out of range; LegalityError, with the numbers, where calibration is missing, leaves the
    domain or would need more than is allowed.
    """

    variant: Variant = "power"
    power: int = 4
    form: Form = "stable"
    epsilon: float = 1e-3
    delta: float = 1e-6
    division: Division = "exact"
    error: float = 1e-3
    margin: float = 1.5
    domain_lower: float | None = None
    domain_upper: float | None = None
    ratio_lower: float | None = None
    ratio_upper: float | None = None
    length: int | None = None
    max_degree: int = 63
    max_iterations: int = 32
    fit: bool = True

    def __post_init__(self) -> None:
        for name, choices in (("variant", Variant), ("form", Form), ("division", Division)):
            if getattr(self, name) not in get_args(choices):
                known = ", ".join(get_args(choices))
                raise InputError(f"attention: {name} must be one of {known}, got {getattr(self, name)!r}")
        if self.power not in POWERS:
            raise InputError(f"attention: the power must be one of {', '.join(map(str, POWERS))}, got {self.power}")
        if self.division == "goldschmidt" and self.form == "stable":
            raise InputError(
                "attention: the stable form divides by a maximum, which is no polynomial; use form lipschitz or "
                "length_agnostic with Goldschmidt's division"
            )
        if not (0 < self.error < 1 and self.epsilon > 0 and self.delta > 0 and self.margin >= 1):
            raise InputError("attention: needs 0 < error < 1, epsilon > 0, delta > 0 and margin >= 1")
        if self.domain_lower is not None and self.domain_lower >= 0:
            raise InputError(f"attention: domain_lower must be negative, got {self.domain_lower}")
        if self.domain_upper is not None and self.domain_upper <= 0:
            raise InputError(f"attention: domain_upper must be positive, got {self.domain_upper}")
        ratios = (self.ratio_lower, self.ratio_upper)
        if ratios != (None, None) and (None in ratios or not 0 < ratios[0] < ratios[1]):  # type: ignore[operator]
            raise InputError(f"attention: give both of 0 < ratio_lower < ratio_upper, got {ratios[0]} and {ratios[1]}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node, parts in attentions(model):
            if not self._selects(node):
                continue
            ranges = attention_range_of(node.outputs[0])
            attributes = single(self._attributes(module_path(node), parts.scale, ranges))
            if node.op_type == _OPERATORS[self.variant] and _same(node, attributes):
                continue
            _rewrite(node, _OPERATORS[self.variant], parts, attributes)
            modified = True
        if modified:
            remove_unused(model)
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        if self.fit or self.variant != "chebyshev":
            for node in nodes_of_type(model, "Softmax", domain=""):
                raise ir.passes.PostconditionError(f"the softmax of {module_path(node)} is not one of an attention")

    def _selects(self, node: ir.Node) -> bool:
        """Select softmax attentions, and those of this variant that are not fitted yet."""
        if node.op_type == "MatMul":
            return self.fit or self.variant != "chebyshev"
        return self.fit and node.op_type == _OPERATORS[self.variant] and attribute(node, "error_bound") == 0.0

    def _attributes(self, where: str, scale: float, ranges: AttentionRange | None) -> dict[str, Any]:
        if self.variant == "power":
            return {"scale": scale, **self._power(where, ranges)}
        if self.variant == "gaussian_kernel":
            return {"scale": scale, **self._gaussian(where, ranges)}
        return {"scale": scale, **self._chebyshev(where, ranges)}

    def _power(self, where: str, ranges: AttentionRange | None) -> dict[str, Any]:
        common = {"power": self.power, "form": self.form, "epsilon": self.epsilon, "delta": self.delta}
        exact = {"division": "exact", "iterations": 0, "ratio_lower": 0.0, "ratio_upper": math.inf, "error_bound": 0.0}
        if not self.fit:
            return {**common, **exact, "domain_upper": math.inf}
        upper = self.domain_upper
        if ranges is not None:
            largest = max(-ranges.scores.lower, ranges.scores.upper)
            upper = largest * self.margin if upper is None else upper
            require_within(where, "the score", ranges.scores, -upper, upper)
        if self.division == "exact":
            return {**common, **exact, "domain_upper": math.inf if upper is None else upper}
        seen = None if ranges is None else divisor_range(ranges, self.form, self.power, self.epsilon)
        ratio = self._ratio(where, seen)
        iterations = self._iterations(where, ratio, self.error)
        return {
            **common,
            "division": "goldschmidt",
            "iterations": iterations,
            "ratio_lower": ratio.lower,
            "ratio_upper": ratio.upper,
            "domain_upper": math.inf if upper is None else upper,
            "error_bound": goldschmidt.relative_error(ratio.lower, ratio.upper, iterations),
        }

    def _gaussian(self, where: str, ranges: AttentionRange | None) -> dict[str, Any]:
        if not self.fit:
            return {"squarings": 0, "domain_lower": -math.inf, "domain_upper": 0.0, "error_bound": 0.0}
        lower = self.domain_lower
        if lower is None:
            lower = min(self._calibrated(where, ranges).exponents.lower * self.margin, -1.0)
        if ranges is not None:
            # ‖q - k‖² is computed from three sums: rounding may leave it a little below zero.
            seen = Interval(ranges.exponents.lower, min(ranges.exponents.upper, 0.0))
            require_within(where, "the exponent", seen, lower, 0.0)
        squarings = exponential.squarings_for(lower, self.error)
        if squarings is None or squarings > self.max_iterations:
            raise LegalityError(
                f"{where}: exponents down to {lower:.6g} with an error of {self.error:.3g} need more squarings than "
                f"{self.max_iterations}; ask for a larger error or train with a heavier range loss"
            )
        error_bound = exponential.squaring_error(lower, squarings)
        return {"squarings": squarings, "domain_lower": lower, "domain_upper": 0.0, "error_bound": error_bound}

    def _chebyshev(self, where: str, ranges: AttentionRange | None) -> dict[str, Any]:
        seen = self._calibrated(where, ranges)
        slack = (seen.scores.upper - seen.scores.lower) * (self.margin - 1) / 2
        shift = seen.scores.upper + slack  # no exponent is then above zero
        lower = seen.scores.lower - slack - shift if self.domain_lower is None else self.domain_lower
        require_within(where, "the score less its shift", Interval(seen.scores.lower - shift, -slack), lower, 0.0)
        length = seen.length if self.length is None else self.length
        require_within(where, "the number of keys", Interval(1, seen.length), 1, length)
        halvings = max(0, math.ceil(math.log2(-lower / _WIDEST_EXPONENTS)))
        shrunk = lower / 2**halvings
        # R - 1 ≤ error/2 for R = ((1 + η)/(1 - η))^(2^k).
        wanted = math.tanh(math.log1p(self.error / 2) / 2 ** (halvings + 1))
        series = exponential.series_for(shrunk, 0.0, wanted * math.exp(shrunk), self.max_degree)
        if series is None:
            raise LegalityError(
                f"{where}: exp on [{shrunk:.6g}, 0] to {wanted * math.exp(shrunk):.3g} (an error of {self.error:.3g}, "
                f"scores {-lower:.6g} apart) needs a degree above {self.max_degree}; ask for a larger error or max_degree, "
                "or train with the power or gaussian_kernel variant"
            )
        coefficients, squarings, error = series
        relative = error / math.exp(shrunk)
        spread = ((1 + relative) / (1 - relative)) ** (2**halvings)
        ratio = self._ratio(where, Interval(math.exp(shrunk) * (1 - relative), length * (1 + relative)))
        iterations = self._iterations(where, ratio, self.error / 2)
        division = goldschmidt.relative_error(ratio.lower, ratio.upper, iterations)
        attributes = {
            "shift": shift,
            "coefficients": list(coefficients),
            "squarings": squarings,
            "iterations": iterations,
            "ratio_lower": ratio.lower,
            "ratio_upper": ratio.upper,
            "halvings": halvings,
            "square_iterations": 0,
            "square_lower": 1.0,
            "domain_lower": lower,
            "domain_upper": 0.0,
        }
        if halvings:
            # Weights that sum to at least 1 - error/2 have squares that sum to at least that squared over their number.
            squares = Interval((1 - self.error / 2) ** 2 / length, 1.0)
            square_iterations = self._iterations(where, squares, self.error / 2)
            division = goldschmidt.relative_error(squares.lower, squares.upper, square_iterations)
            attributes |= {"square_iterations": square_iterations, "square_lower": squares.lower}
        return attributes | {"error_bound": spread - 1 + division}

    def _calibrated(self, where: str, ranges: AttentionRange | None) -> AttentionRange:
        if ranges is None:
            raise LegalityError(
                f"{where}: nothing was recorded of this attention; run calibrate before approximate_softmax"
            )
        return ranges

    def _ratio(self, where: str, seen: Interval | None) -> Interval:
        """Return the domain of the divisor."""
        if self.ratio_lower is not None and self.ratio_upper is not None:
            if seen is not None:
                require_within(where, "the divisor", seen, self.ratio_lower, self.ratio_upper)
            return Interval(self.ratio_lower, self.ratio_upper)
        if seen is None:
            raise LegalityError(
                f"{where}: nothing was recorded of this attention; run calibrate before approximate_softmax, or give "
                "ratio_lower and ratio_upper"
            )
        if self.variant == "chebyshev":
            return seen  # bounds, not observations
        widened = seen.widened(self.margin)
        return Interval(max(widened.lower, self.epsilon), widened.upper)  # a sum of even powers is at least zero

    def _iterations(self, where: str, ratio: Interval, error: float) -> int:
        iterations = goldschmidt.iterations_for(ratio.lower, ratio.upper, error)
        if iterations > self.max_iterations:
            raise LegalityError(
                f"{where}: divisors between {ratio.lower:.3g} and {ratio.upper:.3g} need {iterations} Goldschmidt "
                f"iterations for an error of {error:.3g}, more than {self.max_iterations}; raise epsilon or max_iterations, "
                "use form length_agnostic, or train with a heavier range loss"
            )
        return iterations


def _same(node: ir.Node, attributes: dict[str, Any]) -> bool:
    return all(name in node.attributes and attribute(node, name) == value for name, value in attributes.items())


def _rewrite(node: ir.Node, op_type: str, parts: AttentionParts, attributes: dict[str, Any]) -> None:
    inputs = [parts.q, parts.k, parts.v, parts.bias]
    new = ir.node(op_type, inputs, attributes, domain=DOMAIN, metadata_props={ORIGIN: module_path(node)})
    replace_node(node, [new], new.outputs)
