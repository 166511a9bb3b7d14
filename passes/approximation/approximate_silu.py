"""Replace every SiLU by a polynomial on a symmetric domain [-M, M].

    SiLU(x)  →  PolynomialSiLU(x; coefficients, domain, error_bound)   form "series"
             →  ComposedSiLU(x; coefficients, domain, error_bound)     form "composed"

"series": the Chebyshev interpolant of the lowest degree that reaches the wanted error, near-minimax. "composed":
x·(1 + s(x))/2 with s a composition of odd polynomials of degree 7, fewer products where the domain is wide (Lee et al.,
arXiv 2104.08449; Rho et al., arXiv 2410.02486; `hecompile.approximation.silu`). `error_bound` is the largest absolute error
over the domain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import onnx_ir as ir

from hecompile.approximation import silu
from hecompile.errors import InputError, LegalityError
from hecompile.graph.ir import DOMAIN, ORIGIN, module_path, nodes_of_type, replace_node, single
from hecompile.polynomial.ranges import Interval, interval_of, require_within

Form = Literal["series", "composed"]


@dataclass(frozen=True)
class ApproximateSiLU(ir.passes.InPlacePass):
    """Replace SiLUs.

    form: "series" or "composed". error: largest absolute. margin: factor by which M exceeds the largest calibrated |x|.
    domain_upper: M itself, within which calibration must stay. max_degree: of the series.

    Raises InputError for options out of range; LegalityError, with the numbers, where calibration is missing, leaves the
    domain, or no degree reaches the error.
    """

    form: Form = "series"
    error: float = 1e-2
    margin: float = 1.5
    domain_upper: float | None = None
    max_degree: int = 254

    def __post_init__(self) -> None:
        if self.form not in get_args(Form):
            raise InputError(f"activation: form must be one of {', '.join(get_args(Form))}, got {self.form!r}")
        if not (0 < self.error < 1 and self.margin >= 1 and self.max_degree >= 2):
            raise InputError("activation: needs 0 < error < 1, margin >= 1 and max_degree >= 2")
        if self.domain_upper is not None and self.domain_upper <= 0:
            raise InputError(f"activation: domain_upper must be positive, got {self.domain_upper}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in nodes_of_type(model, "SiLU"):
            where = module_path(node)
            bound = self._bound(where, interval_of(node.outputs[0]))
            if self.form == "series":
                op_type, fit = "PolynomialSiLU", silu.series_for(bound, self.error, self.max_degree)
            else:
                op_type, fit = "ComposedSiLU", silu.composition_for(bound, self.error)
            if fit is None:
                series = f"a degree above {self.max_degree}"
                limit = series if self.form == "series" else "more than 4 composed polynomials"
                raise LegalityError(
                    f"{where}: SiLU on [{-bound:.6g}, {bound:.6g}] to {self.error:.3g} needs {limit}; ask for a larger "
                    "error or train with a heavier range loss"
                )
            coefficients, error = fit
            attributes = single(
                {
                    "coefficients": list(coefficients),
                    "domain_lower": -bound,
                    "domain_upper": bound,
                    "error_bound": error,
                }
            )
            new = ir.node(op_type, node.inputs, attributes, domain=DOMAIN, metadata_props={ORIGIN: where})
            replace_node(node, [new], new.outputs)
            modified = True
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        if any(nodes_of_type(model, "SiLU")):
            raise ir.passes.PostconditionError("a SiLU is left")

    def _bound(self, where: str, seen: Interval | None) -> float:
        if self.domain_upper is not None:
            if seen is not None:
                require_within(where, "the input", seen, -self.domain_upper, self.domain_upper)
            return self.domain_upper
        if seen is None:
            raise LegalityError(
                f"{where}: nothing was recorded of this SiLU; run calibrate before approximate_silu, or give domain_upper"
            )
        return max(-seen.lower, seen.upper, 1e-3) * self.margin
