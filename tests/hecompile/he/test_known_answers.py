"""Bytes that must never change: bundles and workers made by one version are read by the next."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from hecompile.he.hints import Hint
from hecompile.he.kernels.ring_shape import trinomial
from hecompile.he.parameters import LinearParameters, RingParameters
from hecompile.he.public_matrix import PublicMatrix
from hecompile.he.random.sampling import PublicSeed
from hecompile.he.scheme import _encrypt_with, decrypt, evaluate, setup
from tests.hecompile.he.exact import encryption, inner_products

VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text())
SEED = PublicSeed.from_hex(VECTORS["seed"])
TOKENS, FEATURES, OUTPUTS = 100, 24, 10


def digest(data: NDArray[np.generic] | Tensor) -> str:
    array = data.numpy() if isinstance(data, Tensor) else data
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def small(label: str, shape: tuple[int, ...], low: int, high: int) -> NDArray[np.int64]:
    """Test values in [low, high] from the public seed: known to all, so of no use as secrets."""
    stream = SEED.derive("known answers").stream(label).uint32(0, int(np.prod(shape)))
    return (stream % (high - low + 1)).astype(np.int64).reshape(shape) + low


def ring(name: str) -> RingParameters:
    """E.g. of "512x3", which is not packed, and of "512x3 packed"."""
    size, *packed = name.split()
    ring_dim, rank = size.split("x")
    return RingParameters(int(ring_dim), int(rank), packed=packed == ["packed"])


def test_public_stream() -> None:
    first = SEED.stream("A").uint32(0, 4)
    assert [f"{word:08x}" for word in first] == VECTORS["first_words_of_A"]
    assert SEED.derive("bundle").hex() == VECTORS["derived_seed"]


@pytest.mark.parametrize("name", VECTORS["rings"])
def test_known_answers(name: str) -> None:
    params, pinned = ring(name), VECTORS["rings"][name]
    public = PublicMatrix(params, SEED, FEATURES)
    weight = torch.from_numpy(small("weight", (OUTPUTS, FEATURES), -127, 127).astype(np.int8))
    secret = small("secret", (params.rank, params.ring_dim), -1, 1).astype(np.int8)
    error = small("error", (TOKENS, FEATURES), -29, 29).astype(np.int8)
    x = torch.from_numpy(small("x", (TOKENS, FEATURES), -30000, 30000))
    hint = setup(weight, public)
    found = {"A": digest(public.coefficients(slice(0, FEATURES))), "hint": digest(hint)}
    for limbs, reply_bytes in ((4, 4), (3, 2)):
        linear = LinearParameters.from_weight(weight, 8 * limbs, 8 * reply_bytes)
        ciphertext, key = _encrypt_with(public, [secret], error, x, linear)
        reply = evaluate(weight, ciphertext.planes, linear)
        found |= {
            f"ciphertext_{limbs}": digest(ciphertext.planes),
            f"reply_{limbs}_{reply_bytes}": digest(reply),
            f"decrypted_{limbs}_{reply_bytes}": digest(
                decrypt(key, Hint.from_coefficients(params, hint), reply, linear)
            ),
        }
    assert found == pinned


@pytest.mark.parametrize("name", VECTORS["rings"])
def test_known_answers_agree_with_exact_integers(name: str) -> None:
    params = ring(name)
    public = PublicMatrix(params, SEED, FEATURES)
    secret = small("secret", (params.rank, params.ring_dim), -1, 1).astype(np.int8)
    error = small("error", (TOKENS, FEATURES), -29, 29).astype(np.int8)
    x = torch.from_numpy(small("x", (TOKENS, FEATURES), -30000, 30000))
    weight = small("weight", (OUTPUTS, FEATURES), -127, 127)
    b = encryption(public, secret, error, x)  # [T, in]
    planes = b.astype("<u4")[..., None].view(np.uint8).transpose(2, 0, 1)  # [4, T, in]
    assert digest(planes) == VECTORS["rings"][name]["ciphertext_4"]
    # W·b - ⟨W·A, s⟩ must be W·(x + e), which is what decryption pins
    masks = inner_products(public.coefficients(slice(0, FEATURES)), secret, trinomial(params))[:, :TOKENS].T  # [T, in]
    exact = (b - masks) @ weight.T % 2**32
    assert (exact == (x.numpy() + error) @ weight.T % 2**32).all()
    assert digest((exact + 2**31) % 2**32 - 2**31) == VECTORS["rings"][name]["decrypted_4_4"]
