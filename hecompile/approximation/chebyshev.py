"""Fit a Chebyshev series to a function on an interval, and evaluate it in logarithmic depth.

A series p(u) = Σ c_k·T_k(u) lives on u ∈ [-1, 1]. Fits interpolate at Chebyshev nodes, which is within a factor
2 + (2/π)·ln(n + 1) of the best polynomial of degree n (Trefethen, Approximation Theory and Approximation Practice, theorem
15.2 and 16.1). Evaluation is Paterson and Stockmeyer's with Chebyshev polynomials in place of powers, which keeps it stable:
p = q·T_g + r, with T_a·T_b = (T_{a+b} + T_{|a-b|})/2 (Chen, Chillotti and Song, Eurocrypt 2019, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Generic

import numpy as np
from numpy.polynomial import chebyshev

from hecompile.approximation.arithmetic import T

Function = Callable[[np.ndarray], np.ndarray]

_GRID = 4001


def to_unit(x: T, lower: float, upper: float) -> T:
    """Map [lower, upper] onto [-1, 1] affinely."""
    half = (upper - lower) / 2
    result: T = (x - (upper + lower) / 2) * (1 / half)
    return result


def grid(lower: float, upper: float, points: int = _GRID) -> np.ndarray:
    """Return points f64 [points] from `lower` to `upper`, denser toward the edges as extrema of an error curve are."""
    return (lower + upper) / 2 - (upper - lower) / 2 * np.cos(np.linspace(0.0, math.pi, points))


def interpolate(function: Function, degree: int, lower: float, upper: float) -> np.ndarray:
    """Return the Chebyshev coefficients f64 [degree + 1] of the interpolant of `function` on [lower, upper]."""
    half, middle = (upper - lower) / 2, (upper + lower) / 2
    result: np.ndarray = chebyshev.chebinterpolate(lambda u: function(u * half + middle), degree)
    return result


def value(coefficients: Sequence[float] | np.ndarray, x: np.ndarray, lower: float, upper: float) -> np.ndarray:
    """Evaluate the series at x in float64 (Clenshaw), for measuring errors."""
    result: np.ndarray = chebyshev.chebval(to_unit(x, lower, upper), np.asarray(coefficients))
    return result


def smallest_degree(error_of: Callable[[int], float], wanted: float, largest: int, step: int = 1) -> int | None:
    """Return the smallest degree, a multiple of `step`, with an error of at most `wanted`; None if none up to `largest` has.

    Doubles, then halves the interval: an error that wobbles between neighbouring degrees may cost a step.
    """
    high = step
    while error_of(high) > wanted:
        if high >= largest:
            return None
        high = min(2 * high, largest - largest % step)
    low = 0
    while high - low > step:
        middle = (low + high) // 2 // step * step
        if middle in (low, high):
            middle = low + step
        if error_of(middle) <= wanted:
            high = middle
        else:
            low = middle
    return high


class _Basis(Generic[T]):
    """Make each T_k of one operand once, by T_{a+b} = 2·T_a·T_b - T_{a-b}."""

    def __init__(self, u: T) -> None:
        self._made: dict[int, T] = {1: u}

    def __getitem__(self, k: int) -> T:
        if k not in self._made:
            a, b = (k + 1) // 2, k // 2
            left: T = self[a]
            right: T = self[b]
            product: T = (left + left) * right
            self._made[k] = product - 1.0 if a == b else product - self[1]
        return self._made[k]


def evaluate(coefficients: Sequence[float], u: T) -> T:
    """Evaluate Σ c_k·T_k(u) for u within [-1, 1]; zero coefficients cost nothing.

    Raises ValueError where all coefficients of degree ≥ 1 are zero.

    A series with no odd term but the first, as that of a SiLU on a symmetric interval, is evaluated in T_2(u): half of the
    products.
    """
    series = np.trim_zeros(np.asarray(coefficients, dtype=np.float64), "b")
    if len(series) < 2:
        raise ValueError("a constant is not a polynomial of its operand")
    if len(series) > 3 and not series[3::2].any():
        second: T = u * u * 2.0 - 1.0  # T_2
        even: T = _evaluate(series[::2], _Basis(second))
        return even if series[1] == 0 else _added(even, u * float(series[1]))
    return _evaluate(series, _Basis(u))


def _evaluate(series: np.ndarray, basis: _Basis[T]) -> T:
    baby = 2 ** max(1, round(math.log2(len(series)) / 2))
    return _recurse(series, basis, baby)


def _recurse(series: np.ndarray, basis: _Basis[T], baby: int) -> T:
    degree = len(series) - 1
    if degree < baby:
        return _leaf(series, basis)
    giant = baby * 2 ** int(math.log2(degree // baby))  # giant ≤ degree < 2·giant
    quotient = series[giant:] * 2.0
    quotient[0] = series[giant]
    remainder = series[:giant].copy()
    for j in range(1, len(quotient)):
        remainder[giant - j] -= series[giant + j]
    high: T = basis[giant]
    product: T = high * float(quotient[0]) if not quotient[1:].any() else _recurse(quotient, basis, baby) * high
    remainder = np.trim_zeros(remainder, "b")
    if len(remainder) == 0:
        return product
    return _added(product, float(remainder[0]) if len(remainder) == 1 else _recurse(remainder, basis, baby))


def _leaf(series: np.ndarray, basis: _Basis[T]) -> T:
    total: T | None = None
    for k in range(1, len(series)):
        if series[k] != 0.0:
            term: T = basis[k] * float(series[k])
            total = term if total is None else _added(total, term)
    assert total is not None
    return total if series[0] == 0.0 else _added(total, float(series[0]))


def _added(a: T, b: T | float) -> T:
    result: T = a + b
    return result
