"""Rows of zeros: they are sent as encryptions of zero, and come back as exact zeros."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hecompile.he.fused import encrypt_reals
from hecompile.he.kernels.ring_shape import trinomial
from hecompile.he.parameters import (
    LinearParameters,
)
from hecompile.he.public_matrix import PublicMatrix
from hecompile.he.random.sampling import SIGMA
from tests.hecompile.he.exact import inner_products, words
from tests.hecompile.he.test_fused import SEED, TOY, reals, round_trip, weights


def test_rows_of_zeros_are_sent_and_come_back_as_zeros() -> None:
    x = reals(30, 12)
    x[[0, 7, 29]] = 0
    x[7] = 1e-38  # times the factors below: too small for a scale
    factors = torch.full((12,), 1e-290, dtype=torch.float64)
    for scale, zero in ((None, [0, 29]), (factors, [0, 7, 29])):
        result, key = round_trip(x, weights(9, 12), column_scale=scale)
        assert key.tokens == 30 and not result[zero].any() and not torch.signbit(result[zero]).any()
    result, _ = round_trip(x, weights(9, 12))
    exact = x.double() @ weights(9, 12).double().t()
    assert torch.allclose(result.double(), exact, rtol=1e-3, atol=1e-3 * float(exact.abs().max()))


def test_nothing_but_zeros_is_sent_as_well() -> None:
    result, key = round_trip(torch.zeros(5, 12), weights(9, 12))
    assert key.tokens == 5
    assert result.shape == (5, 9)
    assert not result.any()


@pytest.mark.parametrize("limbs", [3, 4])
def test_the_ciphertext_of_a_row_of_zeros_is_distributed_as_any_other(limbs: int) -> None:
    """Its bytes are uniform, and under the mask is an error of the full width, fresh for every feature."""
    features = 4000
    linear = LinearParameters.from_weight(weights(2, features), 8 * limbs, 16)
    x = reals(16, features)
    x[3] = 0
    public = PublicMatrix(TOY, SEED, features)
    ciphertext, key = encrypt_reals(public, x, linear)
    for plane in ciphertext.planes[:, 3].numpy():
        counts = np.bincount(plane, minlength=256)
        statistic = float(((counts - features / 256) ** 2 / (features / 256)).sum())
        assert abs(statistic - 255) < 6 * np.sqrt(510)
    secret = key._secrets[0].astype(np.int64)  # [rank, d]
    mask = inner_products(public.coefficients(slice(0, features)), secret, trinomial(TOY))[:, 3]
    sent = words(ciphertext.planes).astype(np.int64)[3] << (8 * (4 - limbs))
    error = ((sent - mask + 2**31) % 2**32 - 2**31).astype(np.float64)
    rounding = (linear.upload_step**2 - 1) / 12
    assert error.std() == pytest.approx(np.sqrt(SIGMA**2 + rounding), rel=0.06)
    assert abs(error.mean() - (0.5 if limbs == 3 else 0)) < 6 * error.std() / np.sqrt(features)
