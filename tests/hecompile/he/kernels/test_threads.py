"""Work shared out over threads: nothing of it outlives the call, an error ends it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from hecompile.he.kernels.threads import for_each


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _work_on(array: np.ndarray) -> None:
    for_each(lambda part: array.sum(), range(3))


def test_what_the_work_refers_to_is_let_go_of() -> None:
    """A helper that was called off, or has just ended, is still in the pool's hands when the call returns."""
    for _ in range(200):
        array = np.zeros(8)
        gone = weakref.ref(array)
        _work_on(array)
        del array
        assert gone() is None


def test_an_error_is_raised_and_ends_the_work() -> None:
    done = []

    def work(part: int) -> None:
        done.append(part)
        raise ValueError(part)

    with pytest.raises(ValueError, match=r"0|1"):
        for_each(work, range(100))
    assert len(done) <= 2
