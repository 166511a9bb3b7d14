"""Replace the inverse square root of every RMSNorm by a polynomial.

    RMSNorm(x, w; ε)  →  PolynomialRMSNorm(x, w; ε, variance_scale, coefficients, newton_steps, domain, error_bound)

y ≈ 1/√(mean(x²) + ε): the variance is scaled so that its domain ends at 1, a Chebyshev series starts, Newton steps
y ← ½·y·(3 - z·y²) square the relative error (Rho et al., arXiv 2410.02486; `hecompile.approximation.inverse_sqrt`). Degree
and steps are those of the fewest levels that reach the wanted error over the domain; `error_bound` is the largest
relative error there, of the root and therefore of the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from hecompile.approximation.inverse_sqrt import inverse_sqrt_for
from hecompile.errors import InputError, LegalityError
from hecompile.graph.ir import DOMAIN, ORIGIN, attribute, module_path, nodes_of_type, replace_node, single
from hecompile.polynomial.ranges import Interval, interval_of, require_within


@dataclass(frozen=True)
class ApproximateRMSNorm(ir.passes.InPlacePass):
    """Replace RMSNorms.

    error: largest relative error. margin: factor by which the domain exceeds the calibrated variances at both ends.
    domain_lower, domain_upper: the domain of mean(x²) + ε instead, in which calibration must stay. max_degree: of the start.

    Raises InputError for options out of range; LegalityError, with the numbers, where calibration is missing, leaves the
    domain, or no degree reaches the error.
    """

    error: float = 1e-3
    margin: float = 2.0
    domain_lower: float | None = None
    domain_upper: float | None = None
    max_degree: int = 127

    def __post_init__(self) -> None:
        if not (0 < self.error < 1 and self.margin >= 1 and self.max_degree >= 1):
            raise InputError("norm: needs 0 < error < 1, margin >= 1 and max_degree >= 1")
        domain = (self.domain_lower, self.domain_upper)
        if domain != (None, None) and (None in domain or not 0 < domain[0] < domain[1]):  # type: ignore[operator]
            raise InputError(f"norm: give both of 0 < domain_lower < domain_upper, got {domain[0]} and {domain[1]}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in nodes_of_type(model, "RMSNorm"):
            where = module_path(node)
            epsilon = float(attribute(node, "epsilon"))  # type: ignore[arg-type]
            domain = self._domain(where, interval_of(node.outputs[0]), epsilon)
            # Fitted on z = v / upper, whose domain ends at 1.
            root = inverse_sqrt_for(domain.lower / domain.upper, 1.0, self.error, self.max_degree)
            if root is None:
                raise LegalityError(
                    f"{where}: 1/sqrt on variances from {domain.lower:.3g} to {domain.upper:.3g}, a factor of "
                    f"{domain.upper / domain.lower:.3g}, to {self.error:.3g} needs a start of degree above "
                    f"{self.max_degree}; allow more, ask for a larger error, or train with a heavier range loss on the "
                    "variance"
                )
            attributes = single(
                {
                    "epsilon": epsilon,
                    "variance_scale": 1 / domain.upper,
                    "coefficients": list(root.coefficients),
                    "newton_steps": root.newton_steps,
                    "domain_lower": domain.lower,
                    "domain_upper": domain.upper,
                    "error_bound": root.error,
                }
            )
            new = ir.node(
                "PolynomialRMSNorm", node.inputs, attributes, domain=DOMAIN, metadata_props={ORIGIN: module_path(node)}
            )
            replace_node(node, [new], new.outputs)
            modified = True
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        if any(nodes_of_type(model, "RMSNorm")):
            raise ir.passes.PostconditionError("an RMSNorm is left")

    def _domain(self, where: str, seen: Interval | None, epsilon: float) -> Interval:
        if self.domain_lower is not None and self.domain_upper is not None:
            if seen is not None:
                require_within(where, "the variance", seen, self.domain_lower, self.domain_upper)
            return Interval(self.domain_lower, self.domain_upper)
        if seen is None:
            raise LegalityError(
                f"{where}: nothing was recorded of this norm; run calibrate before approximate_rmsnorm, or give "
                "domain_lower and domain_upper"
            )
        if seen.upper <= 0:
            raise LegalityError(f"{where}: calibration saw zeros only; give domain_lower and domain_upper")
        widened = seen.widened(self.margin)
        return Interval(max(widened.lower, epsilon), widened.upper)
