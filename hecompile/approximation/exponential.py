"""Approximate exp on a bounded negative interval, by repeated squaring or by a Chebyshev series.

    exp(x) ≈ (1 + x/2^k)^(2^k)

With n = 2^k: for -n ≤ x ≤ 0 it lies between e^x·(1 - x²/n) and e^x, so the error is at most max x²·e^x / n = 4/(e²·n); for
-2n ≤ x < -n it is at most |1 + x/n|^n ≤ 1 and bounded (Rho et al., arXiv 2410.02486, use k from 9 to 16). The series is one
of exp(x / 2^s), squared s times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from hecompile.approximation.arithmetic import T, squared
from hecompile.approximation.chebyshev import evaluate, grid, interpolate, smallest_degree, to_unit, value

_LARGEST_SQUARINGS = 24
_LARGEST_SERIES_SQUARINGS = 6


def squaring_error(lower: float, squarings: int) -> float:
    """Bound |exp(x) - (1 + x/2^k)^(2^k)| over [lower, 0], lower ≥ -2^(k+1)."""
    n = 2.0**squarings
    inside = 4 / (math.e**2 * n)
    if lower >= -n:
        return inside
    return inside if lower < -2 * n else max(inside, abs(1 + lower / n) ** n + math.exp(-n))


def squarings_for(lower: float, error: float) -> int | None:
    """Return the fewest squarings k, up to 24, with at most `error` over [lower, 0] and lower ≥ -1.5·2^k; else None."""
    for squarings in range(1, _LARGEST_SQUARINGS + 1):
        if lower >= -1.5 * 2.0**squarings and squaring_error(lower, squarings) <= error:
            return squarings
    return None


def by_squaring(x: T, squarings: int) -> T:
    """Return (1 + x/2^k)^(2^k), k = squarings."""
    return squared(x * 2.0**-squarings + 1.0, squarings)


@lru_cache(maxsize=64)
def series_for(
    lower: float, upper: float, error: float, largest_degree: int = 63
) -> tuple[tuple[float, ...], int, float] | None:
    """Choose the series for exp on [lower, upper] of the fewest levels, then of the lowest degree.

    Returns (Chebyshev coefficients of exp(x / 2^s), s, largest error of its 2^s-th power). That error is at most `error`
    relative to exp(upper); None where no degree up to `largest_degree` reaches it.
    """
    best: tuple[tuple[int, int], tuple[float, ...], int, float] | None = None
    for squarings in range(_LARGEST_SERIES_SQUARINGS + 1):
        shrink = 2.0**-squarings

        def fit(degree: int, shrink: float = shrink) -> np.ndarray:
            return interpolate(lambda x: np.exp((x - upper) * shrink), degree, lower, upper)

        def error_of(degree: int, squarings: int = squarings, shrink: float = shrink) -> float:
            return _series_error(fit(degree, shrink), squarings, lower, upper)

        degree = smallest_degree(error_of, error, largest_degree)
        if degree is None:
            continue
        levels = (squarings + math.ceil(math.log2(degree + 1)), degree)
        if best is None or levels < best[0]:
            coefficients = fit(degree) * math.exp(upper * shrink)
            best = (levels, tuple(map(float, coefficients)), squarings, error_of(degree) * math.exp(upper))
    return None if best is None else best[1:]


def _series_error(coefficients: np.ndarray, squarings: int, lower: float, upper: float) -> float:
    """Return the largest |series^(2^s) - exp(x - upper)| on a dense grid, both edges included."""
    x = grid(lower, upper)
    return float(np.abs(squared(value(coefficients, x, lower, upper), squarings) - np.exp(x - upper)).max())


def by_series(x: T, coefficients: Sequence[float], squarings: int, lower: float, upper: float) -> T:
    """Return exp(x) for x within [lower, upper] by the series of `series_for`."""
    return squared(evaluate(coefficients, to_unit(x, lower, upper)), squarings)
