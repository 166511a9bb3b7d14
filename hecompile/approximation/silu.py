"""Approximate SiLU(x) = x·sigmoid(x) by one Chebyshev series, or by a composition of odd polynomials.

SiLU is x/2 plus an even function, and x·(1 + s(x))/2 with the odd s(x) = tanh(x/2).

* The series interpolates at Chebyshev nodes of [-M, M], near-minimax (`hecompile.approximation.chebyshev`); its odd
  coefficients after the first are zero by symmetry.
* The composed form replaces s by p_n ∘ … ∘ p_1, odd polynomials of degree 7 as in the composed sign functions of Cheon et
  al. (Asiacrypt 2020, eprint 2019/1234) and Lee et al. (arXiv 2104.08449; the form of Rho et al., arXiv 2410.02486). They
  are fitted together, by nonlinear least squares of the error of SiLU (scipy), from f_3 = (35x - 35x³ + 21x⁵ - 5x⁷)/16 as
  the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy.optimize import least_squares

from hecompile.approximation.arithmetic import T
from hecompile.approximation.chebyshev import evaluate, grid, interpolate, smallest_degree, to_unit, value

COMPOSED_TERMS = 4
"""Odd coefficients of one polynomial of the composed form: of x, x³, x⁵, x⁷."""
_LARGEST_STAGES = 4
_F3 = (35 / 16, -35 / 16, 21 / 16, -5 / 16)


def silu(x: np.ndarray) -> np.ndarray:
    """Return x / (1 + e^-x) in float64, without overflow."""
    return x * (0.5 + 0.5 * np.tanh(x / 2))


def series(degree: int, bound: float) -> np.ndarray:
    """Return Chebyshev coefficients f64 [degree + 1] on [-bound, bound], degree even; odd ones after the first are zero."""
    coefficients = interpolate(silu, degree, -bound, bound)
    coefficients[1] = bound / 2  # x/2 exactly
    coefficients[3::2] = 0.0
    return coefficients


def series_error(coefficients: Sequence[float] | np.ndarray, bound: float) -> float:
    """Return the largest error over [-bound, bound]."""
    x = grid(-bound, bound)
    return float(np.abs(value(coefficients, x, -bound, bound) - silu(x)).max())


@lru_cache(maxsize=64)
def series_for(bound: float, error: float, largest_degree: int = 254) -> tuple[tuple[float, ...], float] | None:
    """Return (coefficients, largest error over [-bound, bound]) for the lowest even degree that reaches `error`, or None."""
    degree = smallest_degree(lambda n: series_error(series(n, bound), bound), error, largest_degree, step=2)
    if degree is None:
        return None
    coefficients = series(degree, bound)
    return tuple(map(float, coefficients)), series_error(coefficients, bound)


def by_series(x: T, coefficients: Sequence[float], bound: float) -> T:
    """Return SiLU(x) by the series of `series_for`, for |x| ≤ bound."""
    return evaluate(coefficients, to_unit(x, -bound, bound))


def by_composition(x: T, coefficients: Sequence[float], bound: float) -> T:
    """Return x/2·(1 + s(x/bound)), s composed of `len(coefficients) / 4` odd polynomials, for |x| ≤ bound."""
    half = x * 0.5
    result: T = half * (composed(x * (1 / bound), coefficients) + 1.0)
    return result


def composed(u: T, coefficients: Sequence[float]) -> T:
    """Return p_n(…p_1(u)): four coefficients per polynomial, of u, u³, u⁵ and u⁷; three levels and a constant's each."""
    for at in range(0, len(coefficients), COMPOSED_TERMS):
        a, b, c, d = (float(value) for value in coefficients[at : at + COMPOSED_TERMS])
        square = u * u
        # (a·u + b·u³) + u⁴·(c·u + d·u³): every product of two operands is at most three levels deep.
        low = u * a + (u * b) * square
        high = u * c + (u * d) * square
        u = low + high * (square * square)
    return u


@lru_cache(maxsize=64)
def composition_for(bound: float, error: float) -> tuple[tuple[float, ...], float] | None:
    """Return (coefficients, largest error over [-bound, bound]) of the fewest polynomials that reach `error`, or None."""
    x = grid(0.0, bound, 801)  # odd functions: one half decides
    target = silu(x)
    for stages in range(1, _LARGEST_STAGES + 1):
        begin = np.array(_F3 * stages)

        def residual(flat: np.ndarray) -> np.ndarray:
            return np.nan_to_num(by_composition(x, flat.tolist(), bound) - target, nan=1e6, posinf=1e6, neginf=-1e6)

        solution = least_squares(residual, begin, method="trf", max_nfev=300)
        # A few rounds of reweighting by the error turn the least mean square into nearly the least maximum (Lawson).
        flat, weights = solution.x, np.ones_like(x)
        best, best_error = flat, float(np.abs(residual(flat)).max())
        for _ in range(6):
            weights = np.sqrt(weights**2 * np.maximum(np.abs(residual(flat)) / np.abs(residual(flat)).max(), 1e-3))
            weights = weights / weights.max()
            flat = least_squares(lambda p, w=weights: w * residual(p), flat, max_nfev=60).x
            if (now := float(np.abs(residual(flat)).max())) < best_error:
                best, best_error = flat, now
        coefficients = tuple(map(float, best))
        whole = grid(-bound, bound)
        reached = float(np.abs(by_composition(whole, coefficients, bound) - silu(whole)).max())
        if reached <= error:
            return coefficients, reached
    return None
