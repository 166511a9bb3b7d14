"""Sample batches as Poisson: each example is in a step's batch with probability q, independently and unpredictably."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from hecompile.errors import SecurityError
from hecompile.he.random.sampling import SecretRandom


def poisson_sample(examples: int, expected: int, random: SecretRandom | None = None) -> list[int]:
    """Draw indices below `examples`, each with probability expected / examples, in ascending order; maybe none.

    The probability is rounded down to a multiple of 2^-64, which errs on the safe side. Raises SecurityError for anything
    but `SecretRandom`: amplification by sampling needs that the sample is not known.
    """
    random = SecretRandom() if random is None else random
    if type(random) is not SecretRandom:
        raise SecurityError("examples are sampled from SecretRandom, never from a seed or a public stream")
    if expected >= examples:
        return list(range(examples))
    draws = random.uniform_bytes(8 * examples).view(np.uint64)
    threshold = np.uint64((expected << 64) // examples)
    return [int(index) for index in np.nonzero(draws < threshold)[0]]


class PoissonBatches(Sampler[list[int]]):
    """Yield `steps` Poisson samples per pass, fresh ones every time; `expected` is their mean size."""

    def __init__(self, examples: int, expected: int, steps: int) -> None:
        self.examples, self.expected, self.steps = examples, expected, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.steps):
            yield poisson_sample(self.examples, self.expected)
