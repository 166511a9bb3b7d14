"""Sums of encrypted vectors: exactness within the bound, at the extremes, and what cannot be done with a key."""

from __future__ import annotations

import copy
import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hecompile.errors import FederationError, InputError, SecurityError
from hecompile.he.aggregation import scheme as aggregation
from hecompile.he.aggregation.masks import masks
from hecompile.he.aggregation.parameters import SAMPLES, SMALL_BOUND, AggregationParameters
from hecompile.he.aggregation.scheme import AggregationKey, EncryptedSum, EncryptedVector, encrypt, keygen
from hecompile.he.kernels.ring_shape import trinomial
from hecompile.he.kernels.transform import transform_secrets
from hecompile.he.parameters import RingParameters, test_insecure_parameters
from hecompile.he.random.sampling import ERROR_BOUND, SIGMA, PublicSeed, SecretRandom
from tests.hecompile.he.exact import product

SEED = PublicSeed(bytes(range(32)))
TOY = test_insecure_parameters(16, 2)


def total(
    params: AggregationParameters, vectors: list[np.ndarray], keys: list[AggregationKey]
) -> tuple[EncryptedSum, np.ndarray]:
    result, key_sum = (
        EncryptedSum(params, len(vectors[0])),
        np.zeros((params.ring.rank, params.ring.ring_dim), np.int64),
    )
    for key, x in zip(keys, vectors, strict=True):
        result.add(EncryptedVector.from_bytes(params, encrypt(params, SEED, key, x).to_bytes(), len(x)))
        key_sum += key.spend("share")
    return result, key_sum


def value_error_std(params: AggregationParameters, clients: int) -> float:
    """Standard deviation of an error of a sum of reals: the error and two uniform roundings per client."""
    variance = SAMPLES * SIGMA**2 + (params.step**2 - 1) / 12 + 1 / 12
    return float(np.sqrt(clients * variance) / params.scale)


@settings(max_examples=25, deadline=None)
@given(clients=st.integers(2, 128), used=st.integers(1, 128), size=st.integers(1, 300), upload_bytes=st.sampled_from([3, 4]),
       extreme=st.booleans(), seed=st.integers(0, 2**32))  # fmt: skip
def test_sums_open_within_the_bound_at_the_extremes(
    clients: int, used: int, size: int, upload_bytes: int, extreme: bool, seed: int
) -> None:
    params = AggregationParameters(clients, 1.0, upload_bytes, TOY)
    generator = np.random.default_rng(seed)
    bound = params.integer_bound
    count = min(clients, used)
    signs = generator.choice([-1, 1], size)  # all clients alike: the sum is as large as it can be
    vectors = [
        (bound * signs if extreme else generator.integers(-bound, bound + 1, size)).astype(np.int32)
        for _ in range(count)
    ]
    result, key_sum = total(params, vectors, [keygen(params) for _ in vectors])
    opened = result.open(SEED, key_sum)
    assert np.abs(opened - np.sum(vectors, axis=0, dtype=np.int64)).max() <= params.noise_bound(count)


def test_the_largest_errors_and_keys_do_not_overflow() -> None:
    """The bound with everything at its worst: errors, keys and values all of the largest size, and all rounded one way."""
    params = AggregationParameters(128, 1.0, 3, TOY)
    key = np.full((2, 16), SMALL_BOUND, np.int32)
    x = np.full(64, params.integer_bound, np.int32)
    result = EncryptedSum(params, 64)
    for _ in range(128):
        result.add(aggregation._encrypt_with(params, SEED, key, np.full(64, SMALL_BOUND, np.int32), x))
    opened = result.open(SEED, 128 * key.astype(np.int64))
    assert (opened > 0).all()
    assert np.abs(opened - 128 * x.astype(np.int64)).max() <= params.noise_bound(128)
    with pytest.raises(FederationError, match="overflow beyond 128"):
        result.add(aggregation._encrypt_with(params, SEED, key, np.zeros(64, np.int32), x))


@pytest.mark.parametrize("params", [TOY, test_insecure_parameters(16, 3, packed=True)], ids=["binomial", "trinomial"])
def test_masks_are_products_in_the_order_described(params: RingParameters) -> None:
    key = np.random.default_rng(3).integers(-9, 10, (params.rank, 16)).astype(np.int32)
    got = masks(params, SEED.stream("m"), transform_secrets(key, params), 200)
    words = SEED.stream("m").uint32(0, 8 * 16 * params.rank).astype(np.int64).reshape(params.rank, 16, 8)
    for lane in range(8):
        parts = [product(words[k, :, lane], key[k].astype(np.int64), trinomial(params)) for k in range(params.rank)]
        column = got[:128].reshape(16, 8)[:, lane]
        assert ((sum(parts) - column) % 2**32 == 0).all()


def test_real_parameters_and_what_may_not_be_selected() -> None:
    params = AggregationParameters(5, 1.0)
    assert params.security_bits == pytest.approx(218 - np.log2(5))
    assert AggregationParameters(128, 1.0).security_bits >= 128
    for ring in (RingParameters(128, 10), RingParameters(256, 5)):
        with pytest.raises(SecurityError, match="under 128"):
            AggregationParameters(64, 1.0, 3, ring)
    for wrong in ({"max_clients": 1}, {"max_clients": 129}, {"value_range": 0.0}, {"upload_bytes": 2}):
        with pytest.raises(InputError):
            AggregationParameters(**{"max_clients": 5, "value_range": 1.0, **wrong})  # type: ignore[arg-type]


def test_reals_come_back_within_the_stated_error_and_std() -> None:
    params = AggregationParameters(5, 1.0)
    generator = np.random.default_rng(1)
    values = [generator.normal(0, 0.1, 40_000).clip(-1, 1).astype(np.float32) for _ in range(5)]
    result, key_sum = total(params, [params.quantise(one) for one in values], [keygen(params) for _ in values])
    error = params.to_reals(result.open(SEED, key_sum)) - np.sum(values, axis=0, dtype=np.float64)
    assert np.abs(error).max() <= params.value_error(5)
    assert abs(error.std() / value_error_std(params, 5) - 1) < 0.02  # 40000 samples: 0.35 % is one deviation
    assert len(encrypt(params, SEED, keygen(params), params.quantise(values[0])).to_bytes()) == 3 * 40_000


def test_errors_have_the_width_that_the_security_argument_asks_for() -> None:
    samples = aggregation._small(SecretRandom(), 200_000).astype(np.float64)
    assert abs(samples.std() / 6.4 - 1) < 0.01  # one deviation is 0.16 %
    assert np.abs(samples).max() <= 4 * ERROR_BOUND


def test_a_key_serves_each_use_once_and_is_gone() -> None:
    params = AggregationParameters(2, 1.0)
    key, x = keygen(params), np.zeros(4, np.int32)
    encrypt(params, SEED, key, x)
    with pytest.raises(SecurityError, match="already used to encrypt"):
        encrypt(params, SEED, key, x)
    key.spend("share")
    for use in ("share", "encrypt"):
        with pytest.raises(SecurityError, match="already used"):
            key.spend(use)  # type: ignore[arg-type]
    for refused in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(SecurityError):
            refused(key)
    assert repr(key) == "<AggregationKey>"


def test_a_forked_process_cannot_use_the_key() -> None:
    key = keygen(AggregationParameters(2, 1.0))
    child = os.fork()
    if child == 0:
        try:
            key.spend("encrypt")
        except SecurityError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_wrong_inputs_are_refused() -> None:
    params = AggregationParameters(2, 1.0)
    x = np.zeros(4, np.int32)
    for wrong in (x.astype(np.int64), x.reshape(2, 2), x[:0], np.full(4, params.integer_bound + 1, np.int32)):
        with pytest.raises(InputError):
            encrypt(params, SEED, keygen(params), wrong)
    with pytest.raises(SecurityError):
        encrypt(params, SEED.value, keygen(params), x)  # type: ignore[arg-type]
    with pytest.raises(SecurityError):
        AggregationKey(SEED.stream("k"), params)  # type: ignore[arg-type]
    with pytest.raises(FederationError, match="12 bytes, got 11"):
        EncryptedVector.from_bytes(params, bytes(11), 4)
    result = EncryptedSum(params, 4)
    result.add(encrypt(params, SEED, keygen(params), x))
    with pytest.raises(FederationError, match="5 coordinates in a sum of 4"):
        result.add(encrypt(params, SEED, keygen(params), np.zeros(5, np.int32)))
    with pytest.raises(FederationError, match="no sum of 1 keys"):
        result.open(SEED, np.full((1, 2048), 300))


@pytest.mark.parametrize(
    ("value", "pattern"), [(np.nan, "not finite"), (-np.inf, "not finite"), (1.001, "beyond the agreed")]
)
def test_values_that_cannot_be_encoded(value: float, pattern: str) -> None:
    with pytest.raises(FederationError, match=pattern):
        AggregationParameters(2, 1.0).quantise(np.array([0.0, value], np.float32))


def test_a_wrong_key_opens_noise() -> None:
    params = AggregationParameters(2, 1.0)
    result, key_sum = total(params, [np.zeros(2000, np.int32)] * 2, [keygen(params) for _ in range(2)])
    other = key_sum.copy()
    other[0, 5] += 1
    assert np.abs(result.open(SEED, key_sum)).max() <= params.noise_bound(2)
    assert np.abs(result.open(SEED, other)).max() > 2**30


def test_bytes_are_pinned() -> None:
    """A ciphertext of fixed key and error: changing it breaks every federation whose members run different versions."""
    import hashlib

    params = AggregationParameters(3, 0.5)
    key = (np.arange(2048, dtype=np.int32) % 13 - 6).reshape(1, 2048)
    made = aggregation._encrypt_with(
        params, SEED, key, np.arange(20_000, dtype=np.int32) % 7 - 3, np.arange(20_000, dtype=np.int32)
    )
    assert hashlib.sha256(made.to_bytes()).hexdigest()[:16] == "0fea3c7c05cd870a"
