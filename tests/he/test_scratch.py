"""Memory of large results: used again when nothing refers to it, and never before."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from hecompile.he import scratch
from hecompile.he.fused import encrypt_reals
from hecompile.he.parameters import CATALOGUE, LinearParameters
from hecompile.he.public_matrix import PublicMatrix
from hecompile.he.sampling import PublicSeed
from hecompile.he.scratch import result_of

SHAPE = (3, 100, 50)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(scratch, "_KEPT_FROM", 1000)
    monkeypatch.setattr(scratch, "_kept", {})
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
    results = [result_of(SHAPE, np.uint8) for _ in range(5)]
    addresses = [each.data_ptr() for each in results]
    while results:
        del results[0]
    assert list(scratch._kept) == addresses[-2:]  # the oldest goes first
    result_of((50_000,), np.uint8)
    assert sum(each.nbytes for each in scratch._kept.values()) <= 40_000


def test_small_results_are_left_to_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_KEPT_FROM", 1 << 25)
    result_of(SHAPE, np.uint8)
    assert not scratch._kept


def test_a_ciphertext_in_used_memory_is_written_all_over() -> None:
    public = PublicMatrix(CATALOGUE["512x3"], PublicSeed(bytes(32)), 130)
    linear = LinearParameters(130, 4, 9000, 800.0, 3, 2)
    x = torch.randn(515, 130, generator=torch.Generator().manual_seed(0))
    planes = encrypt_reals(public, x, linear)[0].planes
    address, before = planes.data_ptr(), planes.clone()
    for fill in (0, 255):
        planes.fill_(fill)
        del planes
        planes = encrypt_reals(public, x, linear)[0].planes
        assert planes.data_ptr() == address
        runs = (planes == fill).flatten().unfold(0, 16, 1).all(dim=1)
        assert not runs.any() and not torch.equal(planes, before)
