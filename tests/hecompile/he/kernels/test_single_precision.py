"""Decryption in float32: its error is within what the parameters allow for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hecompile.errors import InputError
from hecompile.he.fused import RealKey, decrypt_reals
from hecompile.he.hints import Hint
from hecompile.he.parameters import (
    CATALOGUE,
    SINGLE_ERROR_BOUND,
    SINGLE_ERROR_STD,
    LinearParameters,
    RingParameters,
)
from hecompile.he.ring import SINGLE, rounding_error_bound

ROWS = 40


def masks(params: RingParameters, hint: torch.Tensor, secrets: np.ndarray, reply_bytes: int) -> torch.Tensor:
    """-⟨H, s⟩ mod 2^32 as decryption makes it, centred: float64 `[tokens, rows]`. A reply of zeros is decrypted."""
    tokens = len(secrets) * params.ring_dim
    linear = LinearParameters(8, len(hint), 80, 30.0, 32, 8 * reply_bytes)
    key = RealKey(params, linear, secrets, np.ones(tokens))
    reply = torch.zeros((reply_bytes, tokens, len(hint)), dtype=torch.uint8)
    return decrypt_reals(key, Hint.from_coefficients(params, hint), reply, linear).double()


@pytest.mark.parametrize("params", CATALOGUE.values(), ids=CATALOGUE)
@pytest.mark.parametrize("kind", ["random", "largest"])
def test_error_is_as_small_as_the_parameters_say(params: RingParameters, kind: str) -> None:
    assert rounding_error_bound(params, SINGLE) + 0.5 <= SINGLE_ERROR_BOUND
    rng = np.random.default_rng(3)
    shape = (ROWS, params.lattice_dim)
    if kind == "random":
        hint = rng.integers(-(2**31), 2**31, shape).astype(np.int32)
        secrets = rng.integers(-1, 2, (3, params.rank, params.ring_dim)).astype(np.int8)
    else:
        hint = np.full(shape, -(2**31), dtype=np.int32) + rng.integers(0, 2, shape).astype(np.int32)
        secrets = np.ones((3, params.rank, params.ring_dim), dtype=np.int8)
    exact, rounded = (masks(params, torch.from_numpy(hint), secrets, count) for count in (4, 2))
    error = torch.remainder(rounded - exact + 2**31, 2**32) - 2**31
    assert 0 < error.abs().max() <= rounding_error_bound(params, SINGLE) + 2**8  # of which reals in float32 make 2^7 each
    if kind == "random":  # as hints are: A is uniform
        assert error.square().mean().sqrt() <= SINGLE_ERROR_STD


def test_a_ring_beyond_the_bound_is_refused() -> None:
    with pytest.raises(InputError, match=r"2048 x 2 is larger than what decryption in float32 is proven for: take one of"):
        RingParameters(2048, 2)


@pytest.mark.parametrize(("reply_bytes", "precision"), [(1, np.float32), (2, np.float32), (3, np.float64), (4, np.float64)])
def test_where_it_is_used(reply_bytes: int, precision: type[np.floating]) -> None:
    """Where replies are rounded to multiples of 2^16: the noise grows by a tenth at most, and bounds say so."""
    linear = LinearParameters(8, 8, 80, 30.0, 32, 8 * reply_bytes)
    assert linear.decryption_precision is precision
    without = (3.2**2 * 30.0**2 + (linear.reply_step**2 - 1) / 12) ** 0.5
    assert without <= linear.noise_std(30.0) * 1.0001 and linear.noise_std(30.0) <= 1.1 * without + 1e-9
    assert (linear.noise_bound >= SINGLE_ERROR_BOUND) == (precision is np.float32)
