"""Approximate 1/√z by a Chebyshev start and Newton steps y ← ½·y·(3 - z·y²).

The method is that of Rho et al., arXiv 2410.02486, appendix on LayerNorm.

With y = (1 + δ)/√z one step leaves δ' = -δ²·(3 + δ)/2, so that it converges from -1 < δ < √3 - 1. The start is fitted for
its relative error: least squares at Chebyshev nodes, weighted by √z.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.polynomial import chebyshev

from hecompile.approximation.arithmetic import T
from hecompile.approximation.chebyshev import evaluate, grid, smallest_degree, to_unit, value

_LARGEST_STEPS = 6
_START_LIMIT = 0.7
"""A start whose |δ| is larger may diverge: √3 - 1 = 0.732."""


@dataclass(frozen=True)
class InverseSqrt:
    """Hold a chosen approximation on [lower, upper]. `error`: the largest relative error over it."""

    coefficients: tuple[float, ...]
    newton_steps: int
    lower: float
    upper: float
    error: float

    @property
    def levels(self) -> int:
        return math.ceil(math.log2(len(self.coefficients))) + 2 * self.newton_steps


def start(degree: int, lower: float, upper: float) -> np.ndarray:
    """Return the Chebyshev coefficients f64 [degree + 1] of a fit of 1/√z on [lower, upper] for the relative error."""
    nodes = chebyshev.chebpts1(8 * (degree + 1))
    z = (upper + lower) / 2 + (upper - lower) / 2 * nodes
    result: np.ndarray = chebyshev.chebfit(nodes, 1 / np.sqrt(z), degree, w=np.sqrt(z))
    return result


def relative_error(coefficients: np.ndarray, newton_steps: int, lower: float, upper: float) -> float:
    """Return the largest |y·√z - 1| over [lower, upper], on a dense grid with both edges."""
    z = _edge_grid(lower, upper)
    delta = value(coefficients, z, lower, upper) * np.sqrt(z) - 1
    for _ in range(newton_steps):
        delta = -(delta**2) * (3 + delta) / 2
    return float(np.abs(delta).max())


def _edge_grid(lower: float, upper: float) -> np.ndarray:
    """Return Chebyshev points and logarithmic ones, which cover the steep end."""
    return np.concatenate([grid(lower, upper), np.geomspace(lower, upper, 4001)])


@lru_cache(maxsize=64)
def inverse_sqrt_for(lower: float, upper: float, error: float, largest_degree: int = 127) -> InverseSqrt | None:
    """Choose the approximation of the fewest levels, then of the lowest degree, with a relative error of at most `error`.

    None where no degree up to `largest_degree` with up to six Newton steps reaches it over [lower, upper].
    """
    best: InverseSqrt | None = None
    for steps in range(_LARGEST_STEPS + 1):

        def error_of(degree: int, steps: int = steps) -> float:
            coefficients = start(degree, lower, upper)
            if steps and relative_error(coefficients, 0, lower, upper) > _START_LIMIT:
                return math.inf
            return relative_error(coefficients, steps, lower, upper)

        degree = smallest_degree(error_of, error, largest_degree)
        if degree is None:
            continue
        coefficients = tuple(map(float, start(degree, lower, upper)))
        candidate = InverseSqrt(coefficients, steps, lower, upper, error_of(degree))
        if best is None or (candidate.levels, len(coefficients)) < (best.levels, len(best.coefficients)):
            best = candidate
    return best


def inverse_sqrt(z: T, coefficients: Sequence[float], newton_steps: int, lower: float, upper: float) -> T:
    """Return 1/√z for z within [lower, upper]."""
    return newton(evaluate(coefficients, to_unit(z, lower, upper)), z, newton_steps)


def newton(y: T, z: T, steps: int) -> T:
    """Take Newton steps towards 1/√z from y, two levels each: y' = 1.5·y - (z/2·y)·y²."""
    half = z * 0.5
    for _ in range(steps):
        y = y * 1.5 - (half * y) * (y * y)
    return y
