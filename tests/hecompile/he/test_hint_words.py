"""Hints in fewer bits a word: packed and unpacked, within the noise that the parameters state, on disk and in decryption."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from hecompile.errors import InputError
from hecompile.he import hint_rounding
from hecompile.he.fused import RealKey, decrypt_reals, encrypt_reals
from hecompile.he.hints import Hint, HintStore, write_hint
from hecompile.he.kernels.hint_words import pack_words, round_words, unpack_words
from hecompile.he.parameters import CATALOGUE, LinearParameters, RingParameters, test_insecure_parameters
from hecompile.he.public_matrix import PublicMatrix
from hecompile.he.random.sampling import PublicSeed
from hecompile.he.scheme import evaluate, setup

SEED = PublicSeed(bytes(range(32)))
TOY = test_insecure_parameters(16, 2)


@pytest.mark.parametrize("bits", range(16, 32))
def test_words_come_back_rounded(bits: int) -> None:
    rng = np.random.default_rng(bits)
    words = rng.integers(-(2**31), 2**31, 3 * 32 * 8).astype(np.int32)
    words[:4] = [-(2**31), 2**31 - 1, 0, -1]
    packed = pack_words(words, 32, bits)
    assert packed.shape == (3, bits, 32)
    found = unpack_words(packed.reshape(-1), 32, bits)
    assert np.array_equal(found, round_words(words, bits))
    error = (found.astype(np.int64) - words + 2**31) % 2**32 - 2**31
    step = 2 ** (32 - bits)
    assert -step // 2 <= error.min() and error.max() <= step // 2 and not (found & (step - 1)).any()


@pytest.mark.parametrize("params", CATALOGUE.values(), ids=CATALOGUE)
def test_noise_is_bounded_and_as_wide_as_stated(params: RingParameters) -> None:
    """By masks alone: replies of zeros are decrypted with the whole hint and with the rounded one."""
    bits, rows, blocks = 18, 40, 3
    rng = np.random.default_rng(5)
    hint = torch.from_numpy(rng.integers(-(2**31), 2**31, (rows, params.lattice_dim)).astype(np.int32))
    secrets = rng.integers(-1, 2, (blocks, params.rank, params.ring_dim)).astype(np.int8)
    linear = LinearParameters(8, rows, 80, 30.0)
    reply = torch.zeros((4, blocks * params.ring_dim, rows), dtype=torch.uint8)
    key = RealKey(params, linear, secrets, np.ones(blocks * params.ring_dim))
    exact, rounded = (
        decrypt_reals(key, Hint.from_coefficients(params, hint, bits=count), reply, kind).double()
        for count, kind in ((32, linear), (bits, dataclasses.replace(linear, hint_bits=bits)))
    )
    error = torch.remainder(rounded - exact + 2**31, 2**32) - 2**31
    assert hint_rounding.terms(params) <= hint_rounding.HINT_TERMS
    assert float(error.abs().max()) <= hint_rounding.error_bound(bits) + 2**8  # reals in float32 make 2^7 each
    ratio = float(error.square().mean()) / hint_rounding.error_variance(bits)
    assert 0.8 < ratio < 1.05  # 11/12 of the most on average in the trinomial's ring, 8/9 in those of 2048 dimensions


def test_the_largest_error_is_reached() -> None:
    """Worst words under a worst secret come within one term of the bound of the ring."""
    params, bits = CATALOGUE["2048x1"], 20
    half = 1 << (31 - bits)
    hint = torch.full((1, 2048), half - 1, dtype=torch.int32)  # rounds down by the most
    secrets = -np.ones((1, 1, 2048), dtype=np.int8)
    secrets[0, 0, 0] = 1  # coefficient 0 is s_0·h_0 - Σ s_k·h_{2048-k}: all terms add up
    linear = LinearParameters(8, 1, 80, 30.0, hint_bits=bits)
    reply = torch.zeros((4, 2048, 1), dtype=torch.uint8)
    key = RealKey(params, linear, secrets, np.ones(2048))
    mask = -decrypt_reals(key, Hint.from_coefficients(params, hint, bits=32), reply, linear)[0, 0]
    rounded = -decrypt_reals(key, Hint.from_coefficients(params, hint, bits=bits), reply, linear)[0, 0]
    assert rounded == 0 and float(mask) == 2048 * (half - 1) <= hint_rounding.error_bound(bits)


@pytest.mark.parametrize("params", [TOY, test_insecure_parameters(16, 6, packed=True)], ids=["module", "packed"])
@pytest.mark.parametrize(("bits", "reply_bytes"), [(16, 2), (20, 2), (23, 3), (24, 2), (27, 3)])
def test_decryption_by_packed_words_is_that_by_rounded_ones(
    tmp_path: Path, params: RingParameters, bits: int, reply_bytes: int
) -> None:
    weight = torch.randint(-128, 128, (70, 40), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    linear = dataclasses.replace(LinearParameters.from_weight(weight, 32, 8 * reply_bytes), hint_bits=bits)
    public = PublicMatrix(params, SEED, 40)
    coefficients = setup(weight, public)
    ciphertext, key = encrypt_reals(public, torch.randn(37, 40, generator=torch.Generator().manual_seed(2)), linear)
    reply = evaluate(weight, ciphertext.planes, linear)
    rounded = torch.from_numpy(round_words(coefficients.numpy(), bits))
    wanted = decrypt_reals(key, Hint.from_coefficients(params, rounded), reply, linear)
    path = write_hint(tmp_path, "a", coefficients, params, bits)
    words = 8 * 9 * params.lattice_dim  # 70 rows in groups of eight
    assert 0 <= path.stat().st_size - words * bits // 8 <= 128
    for cache_bytes in (0, 1 << 20):
        hint = HintStore(tmp_path, params, cache_bytes).hint("a", 70, linear.decryption_precision)
        assert (hint.transformed is not None) == (cache_bytes > 0) and hint.bits == bits
        assert torch.equal(decrypt_reals(key, hint, reply, linear), wanted)
    packed = HintStore(tmp_path, params, 0).hint("a", 70)
    assert torch.equal(packed.coefficients(slice(13, 29)), rounded[13:29])


def test_coarser_hints_than_the_parameters_say_are_refused() -> None:
    weight = torch.ones((9, 8), dtype=torch.int8)
    public, linear = PublicMatrix(TOY, SEED, 8), LinearParameters.from_weight(weight)
    ciphertext, key = encrypt_reals(public, torch.ones(3, 8), linear)
    hint = Hint.from_coefficients(TOY, setup(weight, public), bits=20)
    with pytest.raises(InputError, match="the hint's words have 20 bits; 32 are wanted"):
        decrypt_reals(key, hint, evaluate(weight, ciphertext.planes, linear), linear)
    for bits in (15, 33):
        with pytest.raises(InputError, match="a word of a hint has 16 to 32 bits"):
            dataclasses.replace(linear, hint_bits=bits)
