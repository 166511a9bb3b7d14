"""Check the discrete Gaussian: its table by hand-made uniform numbers, its distribution by samples, and its source.

The statistical bounds are fixed and fail a right sampler with probability below 1e-9 each.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import norm

from hecompile.errors import SecurityError
from hecompile.he.random.sampling import PublicSeed
from hecompile.runtime.privacy.noise import (
    BASE_SIGMA,
    MULTIPLIERS,
    SIGMA_GRID,
    base_cdf,
    base_from_uniform,
    combine,
    discrete_gaussian,
)

BOUND = 13 * BASE_SIGMA
SAMPLES = 1_000_000


def test_the_table_is_the_distribution() -> None:
    """Against an independent computation in exact rationals: exp(-k²/800) to 60 terms of its series."""

    def exponential(x: Fraction) -> Fraction:
        half = x / 2**20  # small; squared twenty times afterwards
        term = total = Fraction(1)
        for n in range(1, 12):
            term = term * half / n
            total += term
        value = Fraction(round(total * 2**300), 2**300)
        for _ in range(20):
            value = Fraction(round(value * value * 2**300), 2**300)
        return value

    mass = [exponential(Fraction(-k * k, 2 * BASE_SIGMA**2)) for k in range(-BOUND, BOUND + 1)]
    total, below = sum(mass), Fraction(0)
    assert len(base_cdf()) == 2 * BOUND
    for step, part in zip(base_cdf(), mass[:-1], strict=True):
        below += part
        assert abs(step - below / total * 2**128) <= 1


def draw(numbers: list[int]) -> list[int]:
    """base_from_uniform at 128-bit numbers, one at a time."""
    found = []
    for number in numbers:
        whole = number.to_bytes(16, "big")
        pieces = iter([whole[:2][::-1], whole[2:8][::-1], whole[8:][::-1]])

        def more(count: int, pieces: object = pieces) -> np.ndarray:
            piece = np.frombuffer(next(pieces), dtype=np.uint8)  # type: ignore[call-overload]
            assert count == len(piece)
            return piece

        found += base_from_uniform(1, more).tolist()
    return found


def test_every_step_of_the_table_is_where_it_should_be() -> None:
    steps = base_cdf()
    for k, step in enumerate(steps):
        below = sum(other <= step - 1 for other in steps)
        at = sum(other <= step for other in steps)
        assert draw([step - 1, step]) == [below - BOUND, at - BOUND], k
    assert draw([0, 2**128 - 1]) == [-BOUND, BOUND]
    assert draw([2**127]) == [0]


def test_levels_are_those_of_the_convolution_theorem() -> None:
    """z_i ≤ s_{i-1} / (√2 η) for η of 2^-100 (Micciancio & Walter, theorem 3), and x_i = z x + (z - 1) x'."""
    smoothing = math.sqrt(math.log(2 * (1 + 2.0**100)) / math.pi)
    width = BASE_SIGMA * math.sqrt(2 * math.pi)
    for z in MULTIPLIERS:
        assert 2 <= z <= width / (math.sqrt(2) * smoothing) < z + 1
        width = math.sqrt((z**2 + (z - 1) ** 2) * width**2)
    assert width / math.sqrt(2 * math.pi) == pytest.approx(SIGMA_GRID, rel=1e-12)
    unit = np.eye(8, dtype=np.int64)
    (a, b, c) = MULTIPLIERS
    expected = [x * y * z for z in (c, c - 1) for y in (b, b - 1) for x in (a, a - 1)]
    assert [int(combine(row[:, None])[0]) for row in unit] == expected
    assert BOUND * sum(expected) < 2**34


def test_samples_have_the_promised_distribution() -> None:
    samples = discrete_gaussian(SAMPLES) / SIGMA_GRID
    # The variance of n normal samples has standard deviation √(2/n): 0.01 is 7 of them.
    assert abs(samples.var() - 1) < 0.01
    assert abs(samples.mean()) < 7 / math.sqrt(SAMPLES)
    # Dvoretzky, Kiefer & Wolfowitz with Massart's constant: P(sup |F_n - F| > t) ≤ 2 exp(-2 n t²), here 1e-10.
    ordered = norm.cdf(np.sort(samples))
    upper, lower = np.arange(1, SAMPLES + 1) / SAMPLES - ordered, ordered - np.arange(SAMPLES) / SAMPLES
    assert max(upper.max(), lower.max()) < math.sqrt(math.log(2 / 1e-10) / (2 * SAMPLES))
    # The tail: how many lie beyond 4 standard deviations, 63 expected; Poisson tails below 1e-9 outside.
    assert 20 < (np.abs(samples) > 4).sum() < 125
    # Independent: neighbours, and those that come from one piece of randomness to the next.
    for lag in (1, 8, 1 << 16):
        assert abs(float(np.mean(samples[lag:] * samples[:-lag]))) < 7 / math.sqrt(SAMPLES - lag)


def test_low_bits_are_uniform() -> None:
    """A grid so fine that nothing of the value that noise is added to shows in its last digits."""
    samples = discrete_gaussian(200_000)
    for modulus in (2, 3, 256):
        counts = np.bincount(samples % modulus, minlength=modulus)
        expected = len(samples) / modulus
        statistic = float(((counts - expected) ** 2 / expected).sum())
        # Chi-squared with k degrees: P(> k + 2√(k x) + 2x) ≤ e^-x (Laurent & Massart), x = 21.
        degrees = modulus - 1
        assert statistic < degrees + 2 * math.sqrt(degrees * 21) + 42


def test_two_draws_differ_and_none_is_possible() -> None:
    assert not np.array_equal(discrete_gaussian(64), discrete_gaussian(64))
    assert discrete_gaussian(0).shape == (0,)


@pytest.mark.parametrize("wrong", [PublicSeed.from_hex("11" * 32), np.random.default_rng(0), 7])
def test_noise_is_drawn_from_secret_randomness_alone(wrong: object) -> None:
    with pytest.raises(SecurityError, match="never from a seed"):
        discrete_gaussian(4, wrong)  # type: ignore[arg-type]
