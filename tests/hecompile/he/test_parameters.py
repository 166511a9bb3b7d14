"""Nothing under 128 bits can be made, and the bounds that keep a product from overflowing."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hecompile.errors import InputError, SecurityError
from hecompile.he.parameters import (
    CATALOGUE,
    LinearParameters,
    RingParameters,
    RingParametersLiteral,
    test_insecure_parameters,
)
from hecompile.he.random.sampling import ERROR_BOUND
from hecompile.he.ring import rounding_error_bound
from hecompile.he.security import security_bits


@pytest.mark.parametrize(
    ("point", "bits"),
    [
        ((1280, 32, 3.2), 133.7),
        ((1279, 32, 3.2), 129.9),
        ((1536, 32, 3.19), 161.0),
        ((1536, 33, 3.2), 127.8),
        ((2048, 32, 3.2), 218.0),
        ((2048, 40, 3.2), 142.0),
        ((1024, 24, 3.2), 142.0),
        ((1024, 32, 100.0), 123.0),
        ((10**6, 32, 3.2), 218.0),
    ],
)
def test_security_is_that_of_the_best_dominated_entry(point: tuple[int, int, float], bits: float) -> None:
    assert security_bits(*point) == bits


@pytest.mark.parametrize("point", [(1024, 32, 3.2), (1247, 32, 3.2), (2048, 49, 3.2), (2048, 32, 3.0), (1, 1, 1.0)])
def test_unknown_security_is_refused(point: tuple[int, int, float]) -> None:
    with pytest.raises(SecurityError, match="no security estimate"):
        security_bits(*point)


@pytest.mark.parametrize("name", CATALOGUE)
def test_catalogue_is_secure_and_exact(name: str) -> None:
    params = CATALOGUE[name]
    assert name == f"{params.ring_dim}x{params.rank}"
    assert params.security_bits >= 128
    assert not params.insecure
    assert rounding_error_bound(params) < 0.125
    assert RingParameters.from_literal(params.to_literal()) == params


def test_catalogue_has_every_ring() -> None:
    assert {params.ring_dim for params in CATALOGUE.values()} == {128, 256, 512, 1024, 2048}


@pytest.mark.parametrize(("ring_dim", "rank"), [(256, 4), (512, 2), (1024, 1), (16, 2)])
def test_insecure_ring_is_refused(ring_dim: int, rank: int) -> None:
    with pytest.raises(SecurityError):
        RingParameters.from_literal(RingParametersLiteral(ring_dim, rank))


@pytest.mark.parametrize(
    ("literal", "error"),
    [
        (RingParametersLiteral(500, 3), InputError),
        (RingParametersLiteral(512, 0), InputError),
        (RingParametersLiteral(512, 3.0), InputError),  # type: ignore[arg-type]
        (RingParametersLiteral(2048, 1, log_q=48), InputError),
        (RingParametersLiteral(512, 3, sigma=128.0), SecurityError),
        (RingParametersLiteral(256, 5, packed=True), InputError),  # there is no such ring
        (RingParametersLiteral(2048, 1, packed=True), InputError),
        (RingParametersLiteral(256, 9, packed=True), InputError),
        (RingParametersLiteral(2048, 64), InputError),  # ring products would not be exact
        (RingParametersLiteral(8, 192), InputError),  # 161 bits by dimension, but the kernels want more points
        (RingParametersLiteral(4, 312), InputError),
    ],
)
def test_malformed_ring_is_refused(literal: RingParametersLiteral, error: type[Exception]) -> None:
    with pytest.raises(error):
        RingParameters.from_literal(literal)


def test_parameters_are_immutable() -> None:
    params = CATALOGUE["512x3"]
    assert params.lattice_dim == 1536
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.rank = 1  # type: ignore[misc]


def test_insecure_parameters_say_so_and_cannot_be_written() -> None:
    params = test_insecure_parameters()
    assert params.insecure
    assert params.security_bits == 0
    assert test_insecure_parameters(512, 3) != CATALOGUE["512x3"]
    with pytest.raises(SecurityError, match="not written"):
        params.to_literal()


@pytest.mark.parametrize(
    ("limbs", "reply", "noise", "bound"),
    [
        (4, 4, 1000 * 29, 2147483 - 29),
        (4, 3, 1000 * 29 + 128, 2147483 - 29),
        (3, 3, 1000 * (29 + 128), 2147483 - 29 - 128),
        # From here on decryption is in float32, and adds 55 · 10^6.
        (3, 2, 1000 * (29 + 128) + 32768 + 55_000_000, 2092450 - 29 - 128),
        (4, 1, 1000 * 29 + 2**23 + 55_000_000, 2084095 - 29),
        (2, 2, 1000 * (29 + 32768) + 55_000_000, 2092483 - 29 - 32768),
    ],
)
def test_bounds_by_hand(limbs: int, reply: int, noise: int, bound: int) -> None:
    assert ERROR_BOUND == 29
    linear = LinearParameters(100, 50, max_l1=1000, max_l2=120.0, upload_bits=8 * limbs, reply_bits=8 * reply)
    assert linear.noise_bound == noise
    assert linear.input_bound == bound
    assert linear.room == 2**31 - 1 - noise
    assert linear.norm_bound == pytest.approx(linear.room / 120.0 - 5.0, rel=1e-8)
    assert linear.bytes_up(7) == limbs * 7 * 100
    assert linear.bytes_down(7) == reply * 7 * 50


def test_predicted_noise_by_hand() -> None:
    exact = LinearParameters(100, 50, max_l1=1000, max_l2=120.0)
    assert exact.noise_std(100.0) == pytest.approx(320.0)
    rounded = LinearParameters(100, 50, max_l1=1000, max_l2=120.0, upload_bits=24, reply_bits=16)
    wanted = ((3.2**2 + 65535 / 12) * 1e4 + (2**32 - 2**16) / 12 + 2**26) ** 0.5
    assert rounded.noise_std(100.0) == pytest.approx(wanted)
    assert rounded.noise_std(torch.tensor([100.0, 0.0])).tolist() == pytest.approx(  # type: ignore[union-attr]
        [wanted, ((2**32 - 2**16) / 12 + 2**26) ** 0.5]
    )


def test_norms_of_a_weight_are_measured() -> None:
    linear = LinearParameters.from_weight(torch.tensor([[3, -4, 0], [-128, 1, 1]], dtype=torch.int8))
    assert (linear.in_features, linear.out_features, linear.max_l1) == (3, 2, 130)
    assert linear.max_l2 == pytest.approx((128**2 + 2) ** 0.5)


@pytest.mark.parametrize(
    "fields",
    [
        {"in_features": 0},
        {"out_features": 0},
        {"upload_bits": 33},
        {"reply_bits": 0},
        {"upload_bits": 16, "reply_bits": 17},
        {"max_l1": 2**15 * 100 + 1, "max_l2": 2.0**18},
        {"max_l1": -1},
        {"max_l2": 1001.0},
        {"max_l2": float("nan")},
        {"upload_bits": 8, "reply_bits": 8},  # rounding alone fills the modulus
    ],
)
def test_impossible_linear_is_refused(fields: dict[str, int]) -> None:
    sound = {"in_features": 100, "out_features": 50, "max_l1": 1000, "max_l2": 120.0}
    LinearParameters(**sound)  # type: ignore[arg-type]
    with pytest.raises(InputError):
        LinearParameters(**{**sound, **fields})  # type: ignore[arg-type]
