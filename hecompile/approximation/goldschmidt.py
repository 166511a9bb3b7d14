"""Divide by Goldschmidt's iteration: 1/d = f·Π (1 + r^(2^i)) with r = 1 - f·d.

For d ∈ [L, U] the factor f = 2/(L + U) makes |r| ≤ ρ = (U - L)/(U + L), and n factors leave the relative error r^(2^n)
exactly, since (1 - r)·Π_{i<n} (1 + r^(2^i)) = 1 - r^(2^n) (Goldschmidt 1964; Cheon et al., Asiacrypt 2019, section 3).
"""

from __future__ import annotations

import math

from hecompile.approximation.arithmetic import T


def start_factor(lower: float, upper: float) -> float:
    """Return f = 2/(L + U), the best scaling of a divisor in [lower, upper]."""
    return 2.0 / (lower + upper)


def relative_error(lower: float, upper: float, iterations: int) -> float:
    """Return the largest relative error over [lower, upper]: ρ^(2^iterations)."""
    return float(((upper - lower) / (upper + lower)) ** (2.0**iterations))


def iterations_for(lower: float, upper: float, error: float) -> int:
    """Return the fewest iterations, at least one, with a relative error of at most `error`."""
    rho = (upper - lower) / (upper + lower)
    if rho <= error:
        return 1
    return max(1, math.ceil(math.log2(math.log(error) / math.log1p(-2 * lower / (upper + lower)))))


def inverse(d: T, lower: float, upper: float, iterations: int) -> T:
    """Return 1/d up to `relative_error`, for d within [lower, upper]."""
    factor = start_factor(lower, upper)
    scaled: T = inverse_of_scaled(d * factor, iterations) * factor
    return scaled


def inverse_of_scaled(d: T, iterations: int) -> T:
    """Return 1/d for d within (0, 2) as (1 + r)·(1 + r²)·(1 + r⁴)…

    It has `iterations` factors, in as many levels less one, but in one level where there are two.
    """
    rest = d * -1.0 + 1.0  # r
    result = rest + 1.0
    for _ in range(iterations - 1):
        rest = rest * rest
        result = result * (rest + 1.0)
    return result
