"""Memory of large results: used again when nothing refers to it, and never before."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from hecompile.he.fused import encrypt_reals
from hecompile.he.kernels import scratch
from hecompile.he.kernels.scratch import result_of
from hecompile.he.parameters import CATALOGUE, LinearParameters
from hecompile.he.public_matrix import PublicMatrix
from hecompile.he.random.sampling import PublicSeed

SHAPE = (3, 100, 50)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(scratch, "_KEPT_FROM", 1000)
    monkeypatch.setattr(scratch, "_results", [])
    yield
    gc.collect()


def test_memory_is_used_again_when_the_result_is_gone() -> None:
    first = result_of(SHAPE, np.uint8)
    address = first.data_ptr()
    assert address % 64 == 0 and first.shape == SHAPE and first.dtype == torch.uint8
    del first
    smaller = result_of((3, 90, 50), np.uint8)
    assert smaller.data_ptr() == address and smaller.shape == (3, 90, 50)


@pytest.mark.parametrize("derived", [lambda t: t[1, 2:], lambda t: t.numpy(), lambda t: memoryview(t.numpy().reshape(-1))])
def test_never_while_something_refers_to_it(derived) -> None:  # type: ignore[no-untyped-def]
    result = result_of(SHAPE, np.uint8)
    result.zero_()
    rest = derived(result)
    del result
    result_of(SHAPE, np.uint8).fill_(9)
    assert not np.asarray(rest).any()


def test_not_for_another_type_nor_for_one_far_smaller_or_larger() -> None:
    address = result_of(SHAPE, np.uint8).data_ptr()
    others = [result_of((3750,), np.float32), result_of((7000,), np.uint8), result_of((16_000,), np.uint8)]
    assert address not in [each.data_ptr() for each in others]
    assert result_of(SHAPE, np.uint8).data_ptr() == address


def test_no_more_is_kept_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_KEPT_IN_ALL", 40_000)
    results = [result_of(SHAPE, np.uint8) for _ in range(3)]
    first, second = results[0].data_ptr(), results[1].data_ptr()
    assert [memory.nbytes for memory, _ in scratch._results] == [15_000, 15_000]  # there is no room for the third
    del results[:2]
    large = result_of((50_000,), np.uint8)  # beyond the bound by itself, so that nothing is gained by making room
    assert [memory.ctypes.data for memory, _ in scratch._results] == [first, second]
    other = result_of((4000,), np.float32)
    assert [memory.ctypes.data for memory, _ in scratch._results] == [second, other.data_ptr()]  # the oldest went
    assert result_of(SHAPE, np.uint8).data_ptr() == second and large.shape == (50_000,)


def test_threads_never_get_the_same_memory() -> None:
    wrong = []

    def work(mark: int) -> None:
        for _ in range(300):
            result = result_of(SHAPE, np.uint8)
            result.fill_(mark)
            if not bool((result == mark).all()):
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(scratch._results) <= 8  # the last one and the next, in each thread


def test_small_results_are_left_to_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_KEPT_FROM", 1 << 25)
    result_of(SHAPE, np.uint8)
    assert not scratch._results


def test_a_ciphertext_in_used_memory_is_written_all_over() -> None:
    public = PublicMatrix(CATALOGUE["512x3"], PublicSeed(bytes(32)), 130)
    linear = LinearParameters(130, 4, 9000, 800.0, 24, 16)
    x = torch.randn(515, 130, generator=torch.Generator().manual_seed(0))
    planes = encrypt_reals(public, x, linear)[0].planes
    address, never_written = planes.data_ptr(), torch.ones_like(planes, dtype=torch.bool)
    for fill in (0, 255, 85, 170, 15):  # a place that is written is equal to all five with probability 2^-40
        planes.fill_(fill)
        del planes
        planes = encrypt_reals(public, x, linear)[0].planes
        assert planes.data_ptr() == address
        never_written &= planes == fill
    assert not never_written.any()
