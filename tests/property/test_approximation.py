"""Every fit keeps its bound over its domain, edges included; evaluation agrees with numpy; the depth is that promised."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial import chebyshev as reference

from hecompile.approximation import chebyshev, exponential, goldschmidt, inverse_sqrt, silu
from hecompile.approximation.arithmetic import power

_UNIT = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=20)
_SLACK = 1 + 1e-3
"""A bound is the maximum over a dense grid; between its points an error can be a little larger."""


def points(lower: float, upper: float, fractions: list[float]) -> np.ndarray:
    """Points of a domain, its edges among them."""
    return lower + (upper - lower) * np.array([0.0, 1.0, *fractions])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-2, 2), min_size=2, max_size=80), _UNIT)
def test_a_series_is_evaluated_as_numpy_does(series: list[float], fractions: list[float]) -> None:
    if not any(series[1:]):
        with pytest.raises(ValueError, match="constant"):
            chebyshev.evaluate(series, np.zeros(1))
        return
    u = points(-1.0, 1.0, fractions)
    np.testing.assert_allclose(chebyshev.evaluate(series, u), reference.chebval(u, series), atol=1e-9)


class _Level:
    """Counts levels: a product is one more than its deeper operand."""

    def __init__(self, level: int = 0) -> None:
        self.level = level

    def _with(self, other: object, cost: int) -> _Level:
        return _Level(max(self.level, other.level if isinstance(other, _Level) else 0) + cost)

    def __add__(self, other: object) -> _Level:
        return self._with(other, 0)

    __sub__ = __add__

    def __mul__(self, other: object) -> _Level:
        return self._with(other, 1)


@pytest.mark.parametrize("degree", [1, 2, 3, 7, 15, 31, 63, 127, 200])
def test_the_depth_of_a_series_is_logarithmic(degree: int) -> None:
    series = np.linspace(1.0, 2.0, degree + 1).tolist()
    assert chebyshev.evaluate(series, _Level()).level <= math.ceil(math.log2(degree + 1)) + 1


@pytest.mark.parametrize("exponent", range(1, 17))
def test_powers(exponent: int) -> None:
    assert power(3.0, exponent) == 3.0**exponent
    assert power(_Level(), exponent).level == math.ceil(math.log2(exponent))


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(1.001, 1e4), st.sampled_from([1e-1, 1e-3, 1e-6]), _UNIT)
def test_goldschmidt(lower: float, ratio: float, error: float, fractions: list[float]) -> None:
    upper = lower * ratio
    iterations = goldschmidt.iterations_for(lower, upper, error)
    bound = goldschmidt.relative_error(lower, upper, iterations)
    assert bound <= error * (1 + 1e-9)
    assert iterations == 1 or goldschmidt.relative_error(lower, upper, iterations - 1) > error * (1 - 1e-9)
    d = points(lower, upper, fractions)
    found = np.abs(goldschmidt.inverse(d, lower, upper, iterations) * d - 1)
    assert found.max() <= bound + 1e-9
    assert found[0] == pytest.approx(bound, abs=1e-9)  # it is reached at the edge


@settings(max_examples=40, deadline=None)
@given(st.floats(-200.0, -0.1), st.sampled_from([1e-1, 1e-2, 1e-3]), _UNIT)
def test_exponential_by_squaring(lower: float, error: float, fractions: list[float]) -> None:
    squarings = exponential.squarings_for(lower, error)
    assert squarings is not None
    bound = exponential.squaring_error(lower, squarings)
    assert bound <= error
    x = points(lower, 0.0, fractions)
    assert np.abs(exponential.by_squaring(x, squarings) - np.exp(x)).max() <= bound


def test_exponential_by_squaring_is_bounded_to_twice_its_domain() -> None:
    x = np.linspace(-(2.0**11), 0.0, 1001)
    assert np.abs(exponential.by_squaring(x, 10)).max() <= 1.0
    assert exponential.squarings_for(-1e9, 1e-3) is None


@settings(max_examples=15, deadline=None)
@given(st.integers(-40, -1), st.sampled_from([1e-2, 1e-4]), _UNIT)
def test_exponential_by_a_series(lower: int, error: float, fractions: list[float]) -> None:
    found = exponential.series_for(float(lower), 0.0, error)
    assert found is not None
    coefficients, squarings, bound = found
    assert bound <= error
    x = points(lower, 0.0, fractions)
    assert np.abs(exponential.by_series(x, coefficients, squarings, lower, 0.0) - np.exp(x)).max() <= bound * _SLACK


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3000), st.sampled_from([1e-1, 1e-2, 1e-3]), _UNIT)
def test_inverse_square_root(ratio: int, error: float, fractions: list[float]) -> None:
    lower = 1 / (1 + ratio)
    found = inverse_sqrt.inverse_sqrt_for(lower, 1.0, error)
    assert found is not None and found.error <= error
    z = points(lower, 1.0, fractions)
    y = inverse_sqrt.inverse_sqrt(z, found.coefficients, found.newton_steps, lower, 1.0)
    assert np.abs(y * np.sqrt(z) - 1).max() <= found.error * _SLACK


def test_newton_squares_the_error_and_a_wide_domain_takes_some_steps() -> None:
    found = inverse_sqrt.inverse_sqrt_for(1e-4, 1.0, 1e-3)
    assert found is not None and found.newton_steps > 0
    assert inverse_sqrt.inverse_sqrt_for(1e-9, 1.0, 1e-3, 15) is None
    z, delta = 0.3, 0.05
    y = inverse_sqrt.newton((1 + delta) / math.sqrt(z), z, 1)
    assert y * math.sqrt(z) - 1 == pytest.approx(-(delta**2) * (3 + delta) / 2)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 60), st.sampled_from([1e-1, 1e-2, 1e-3]), _UNIT)
def test_silu_by_a_series(bound: int, error: float, fractions: list[float]) -> None:
    found = silu.series_for(float(bound), error)
    assert found is not None and found[1] <= error
    x = points(-bound, bound, fractions)
    assert np.abs(silu.by_series(x, found[0], bound) - silu.silu(x)).max() <= found[1] * _SLACK
    assert not any(found[0][3::2])


@pytest.mark.parametrize(("bound", "stages"), [(6.0, 2), (16.0, 2)])
def test_silu_by_composition(bound: float, stages: int) -> None:
    found = silu.composition_for(bound, 1e-2)
    assert found is not None and found[1] <= 1e-2 and len(found[0]) == stages * silu.COMPOSED_TERMS
    x = np.linspace(-bound, bound, 5001)
    assert np.abs(silu.by_composition(x, found[0], bound) - silu.silu(x)).max() <= found[1] * _SLACK
    # Three levels and the constant's for each polynomial, the constant of the argument, the last product.
    assert silu.by_composition(_Level(), found[0], bound).level <= 4 * stages + 2
