"""Per-token scaling to the whole integer range and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hecompile.errors import InputError
from hecompile.he.encode import decode, encode


@pytest.mark.parametrize("bound", [1, 127, 65_000, 2**31 - 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_token_uses_the_whole_range(bound: int, dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, -3.0, 0.5], [1e-30, 2e-30, 0.0], [-7e30, 1.0, 0.0]], dtype=dtype)
    original = x.clone()
    integers, scale = encode(x, bound)
    assert torch.equal(x, original)
    assert integers.dtype == torch.int32
    assert scale.shape == (3, 1)
    assert scale.dtype == torch.float64
    assert integers.long().abs().amax(dim=1).tolist() == [bound] * 3
    error = (decode(integers, scale, torch.float64) - x.double()).abs()
    assert (error <= scale * (0.5 + 1e-6)).all()


def test_rounds_half_to_even() -> None:
    integers, _ = encode(torch.tensor([[8.0, 0.5, 1.5, -2.5, 3.49]]), 8)
    assert integers.tolist() == [[8, 0, 2, -2, 3]]


def test_zero_tokens_come_back_as_exact_zeros_despite_noise() -> None:
    x = torch.tensor([[0.0, -0.0], [1.0, 2.0], [1e-320, 0.0]], dtype=torch.float64)
    integers, scale = encode(x, 1000)
    assert integers.tolist() == [[0, 0], [500, 1000], [0, 0]]
    assert scale[[0, 2], 0].tolist() == [0.0, 0.0]
    back = decode(integers + torch.tensor([[-12345, 12345]]), scale)
    assert back[[0, 2]].tolist() == [[0.0, 0.0]] * 2
    assert not torch.signbit(back[[0, 2]]).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_are_refused(bad: float) -> None:
    with pytest.raises(InputError, match="infinite or NaN"):
        encode(torch.tensor([[1.0, 2.0], [bad, 0.0]]), 100)


@pytest.mark.parametrize("x", [torch.zeros(3), torch.zeros(2, 0), torch.zeros(2, 2, dtype=torch.int32)])
def test_malformed_input_is_refused(x: torch.Tensor) -> None:
    with pytest.raises(InputError, match="float matrix"):
        encode(x, 100)


@pytest.mark.parametrize("bound", [0, -1, 2**31])
def test_impossible_bound_is_refused(bound: int) -> None:
    with pytest.raises(InputError, match="bound"):
        encode(torch.ones(1, 1), bound)


def test_scale_of_another_batch_is_refused() -> None:
    with pytest.raises(InputError, match="scale"):
        decode(torch.zeros(3, 2, dtype=torch.int64), torch.ones(2, 1))


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=6),
    bound=st.integers(1, 2**31 - 1),
)
def test_no_finite_input_leaves_the_range(values: list[float], bound: int) -> None:
    integers, scale = encode(torch.tensor([values], dtype=torch.float64), bound)
    assert integers.long().abs().max() <= bound
    assert torch.isfinite(scale).all()
    if scale.item() > 0:
        assert integers.long().abs().max() == bound
