"""Poisson sampling: the promised rate, independence, and where it is drawn from. Bounds fail below 1e-9."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hecompile.errors import SecurityError
from hecompile.he.random.sampling import PublicSeed
from hecompile.runtime.privacy.sampling import PoissonBatches, poisson_sample

EXAMPLES, EXPECTED, DRAWS = 200, 50, 2000


def test_every_example_is_drawn_at_the_rate_and_independently() -> None:
    drawn = np.zeros((DRAWS, EXAMPLES))
    for row, sample in zip(drawn, PoissonBatches(EXAMPLES, EXPECTED, DRAWS), strict=True):
        assert sample == sorted(set(sample))
        row[sample] = 1
    rate, count = EXPECTED / EXAMPLES, DRAWS * EXAMPLES
    # Hoeffding: P(|mean - q| > t) ≤ 2 exp(-2 n t²).
    assert abs(drawn.mean() - rate) < math.sqrt(math.log(2e10) / (2 * count))
    assert np.abs(drawn.mean(axis=0) - rate).max() < math.sqrt(math.log(2e10 * EXAMPLES) / (2 * DRAWS))
    # Sizes vary as a binomial's do: a shuffled batch of fixed size would not be what the accountant counts.
    variance = drawn.sum(axis=1).var() / (EXAMPLES * rate * (1 - rate))
    assert abs(variance - 1) < 7 * math.sqrt(2 / DRAWS)
    # One draw tells nothing of the next, one example nothing of another.
    centred = drawn - rate
    for product in (centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1]):
        assert abs(product.mean()) < math.sqrt(math.log(2e10) / (2 * product.size))


def test_the_ends() -> None:
    assert poisson_sample(7, 7) == list(range(7))
    assert len(PoissonBatches(10, 2, 5)) == 5
    assert sum(len(poisson_sample(1 << 16, 1)) for _ in range(20)) < 100  # 20 expected


@pytest.mark.parametrize("wrong", [PublicSeed.from_hex("11" * 32), np.random.default_rng(0), 7])
def test_samples_are_drawn_from_secret_randomness_alone(wrong: object) -> None:
    with pytest.raises(SecurityError, match="never from a seed"):
        poisson_sample(10, 2, wrong)  # type: ignore[arg-type]
