"""Encrypt, evaluate, decrypt: right within the bound, exact at the edges, and no secret used twice."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hecompile.errors import InputError, SecurityError, WorkerError
from hecompile.he.encode import decode, encode
from hecompile.he.hints import Hint
from hecompile.he.parameters import CATALOGUE, LinearParameters, RingParameters, test_insecure_parameters
from hecompile.he.public_matrix import PublicMatrix
from hecompile.he.random.sampling import ERROR_BOUND, PublicSeed
from hecompile.he.scheme import _encrypt_with, decrypt, encrypt, encrypt_tokens, evaluate, keygen, setup
from tests.hecompile.he.exact import encryption, words

SEED = PublicSeed(bytes(range(32)))
TOY = test_insecure_parameters(16, 2)


def weights(rows: int, columns: int, seed: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, (rows, columns), generator=generator).to(torch.int8)


def inputs(tokens: int, linear: LinearParameters, seed: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    bound = linear.input_bound
    return torch.randint(-bound, bound + 1, (tokens, linear.in_features), generator=generator)


def sign_of(value: int) -> int:
    return 1 if value > 0 else -1


def products(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (x.double() @ weight.double().t()).long()


def round_trip(params: RingParameters, weight: torch.Tensor, x: torch.Tensor, linear: LinearParameters) -> torch.Tensor:
    public = PublicMatrix(params, SEED, linear.in_features)
    ciphertext, key = encrypt_tokens(public, x, linear)
    assert ciphertext.planes.numel() == linear.upload_limbs * x.numel()
    reply = evaluate(weight, ciphertext.planes, linear)
    assert reply.numel() == linear.reply_bytes * len(x) * linear.out_features
    return decrypt(key, Hint.from_coefficients(params, setup(weight, public)), reply, linear)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 55])
@pytest.mark.parametrize(("upload", "reply"), [(32, 32), (24, 24), (32, 16), (21, 11)])
def test_any_number_of_tokens(tokens: int, upload: int, reply: int) -> None:
    weight = weights(9, 12)
    linear = LinearParameters.from_weight(weight, upload, reply)
    x = inputs(tokens, linear)
    noise = round_trip(TOY, weight, x, linear) - products(x, weight)
    assert noise.shape == (tokens, 9)
    assert 0 < noise.abs().max() <= linear.noise_bound


@pytest.mark.parametrize("params", CATALOGUE.values(), ids=CATALOGUE)
def test_every_ring_of_the_catalogue(params: RingParameters) -> None:
    weight = weights(7, 20)
    linear = LinearParameters.from_weight(weight, 32, 24)
    x = inputs(params.ring_dim + 3, linear).to(torch.int32)
    noise = round_trip(params, weight, x, linear) - products(x, weight)
    assert 0 < noise.abs().max() <= linear.noise_bound


@pytest.mark.parametrize(
    ("upload", "reply"), [(32, 32), (32, 24), (32, 16), (24, 24), (24, 16), (23, 22), (22, 12), (16, 16)]
)
def test_noise_is_as_predicted(upload: int, reply: int) -> None:
    weight = weights(32, 64)
    weight[:8] //= 16  # rows of different norms
    linear = LinearParameters.from_weight(weight, upload, reply)
    x = inputs(1024, linear)
    noise = (round_trip(CATALOGUE["512x3"], weight, x, linear) - products(x, weight)).double()
    assert noise.abs().max() <= linear.noise_bound
    predicted = torch.as_tensor(linear.noise_std(weight.double().norm(dim=1)))
    ratio = noise.square().mean(dim=0).sqrt() / predicted  # [32]
    # 1024 samples a row: one ratio has a standard deviation of 2.2 %, so 20 % is nine of them
    assert (ratio - 1).abs().max() < 0.2
    assert abs(float(ratio.square().mean().sqrt()) - 1) < 0.1


@pytest.mark.parametrize("value", [127, -127, -128])
@pytest.mark.parametrize("sign", [1, -1])
def test_largest_input_with_extreme_weights_and_errors_is_exact(value: int, sign: int) -> None:
    weight = torch.full((3, 8), value, dtype=torch.int8)
    linear = LinearParameters.from_weight(weight)
    public = PublicMatrix(TOY, SEED, 8)
    hint = Hint.from_coefficients(TOY, setup(weight, public))

    def decrypted(magnitude: int) -> torch.Tensor:
        x = torch.full((5, 8), sign * magnitude)
        error = np.full((5, 8), sign * ERROR_BOUND, dtype=np.int8)
        ciphertext, key = _encrypt_with(public, [np.ones((2, 16), dtype=np.int8)], error, x, linear)
        return decrypt(key, hint, evaluate(weight, ciphertext.planes, linear), linear)

    largest = linear.input_bound
    assert (decrypted(largest) == 8 * value * sign * (largest + ERROR_BOUND)).all()
    wrapped = 8 * value * sign * (largest + 1 + ERROR_BOUND)
    assert abs(wrapped) >= 2**31  # one more no longer fits: only -2^31 itself would still come back right
    assert (decrypted(largest + 1) == (wrapped if wrapped == -(2**31) else wrapped - sign_of(wrapped) * 2**32)).all()


@pytest.mark.parametrize(("upload", "reply"), [(32, 32), (24, 24), (24, 16), (22, 15)])
def test_input_beyond_the_bound_is_refused(upload: int, reply: int) -> None:
    weight = torch.full((3, 8), 127, dtype=torch.int8)
    linear = LinearParameters.from_weight(weight, upload, reply)
    public = PublicMatrix(TOY, SEED, 8)
    for sign in (1, -1):
        x = torch.zeros(4, 8, dtype=torch.int64)
        x[2] = sign * linear.input_bound  # parallel to every row: both inequalities are tight
        encrypt_tokens(public, x, linear)
        x[2] += sign
        with pytest.raises(InputError, match="input bound") as refusal:
            encrypt_tokens(public, x, linear)
        assert str(abs(int(x[2, 3]))) not in str(refusal.value)
        # One large value among zeros is far beyond the input bound, and harmless: its norm is small.
        x[2] = 0
        x[2, 3] = sign * 2 * linear.input_bound
        encrypt_tokens(public, x, linear)


@pytest.mark.parametrize(("upload", "reply"), [(32, 32), (24, 24), (24, 16), (16, 8), (18, 12)])
def test_tokens_at_the_norm_bound_decrypt_without_overflow(upload: int, reply: int) -> None:
    weight = weights(40, 48)
    linear = LinearParameters.from_weight(weight, upload, reply)
    # The worst that Cauchy-Schwarz allows: each token parallel to a row of W, in both directions, and as long as it may be.
    tokens = torch.cat([weight.double(), -weight.double()])
    integers, _ = encode(tokens * 1e-3, linear.input_bound, linear.norm_bound)
    assert bool(linear.admits(integers).all())
    longest = integers.double().norm(dim=1)
    assert float(longest.min()) > 0.999 * linear.norm_bound
    assert int(integers.abs().max()) > linear.input_bound, "the norm bound admits no more than the input bound"
    noise = round_trip(TOY, weight, integers, linear) - products(integers, weight)
    assert int(noise.abs().max()) <= linear.noise_bound
    widest = int(weight.double().norm(dim=1).argmax())
    stretched = (integers[widest].double() * 1.001).long()[None]
    with pytest.raises(InputError, match="norm bound"):
        encrypt_tokens(PublicMatrix(TOY, SEED, 48), stretched, linear)


def test_ciphertext_is_what_the_definition_says() -> None:
    public, linear = PublicMatrix(TOY, SEED, 6), LinearParameters(6, 2, max_l1=500, max_l2=250.0)
    generator = np.random.default_rng(7)
    secret = generator.integers(-1, 2, (2, 16)).astype(np.int8)
    error = generator.integers(-ERROR_BOUND, ERROR_BOUND + 1, (11, 6)).astype(np.int8)
    x = inputs(11, linear)
    b = encryption(public, secret, error, x)
    for bits in (8, 13, 16, 22, 24, 31, 32):
        small = LinearParameters(6, 2, max_l1=10, max_l2=5.0, upload_bits=bits, reply_bits=8)
        ciphertext, _ = _encrypt_with(public, [secret], error, x, small)
        step = 2 ** (32 - bits)
        assert ciphertext.planes.dtype == torch.uint8 and len(ciphertext.planes) == small.upload_limbs
        unused = 8 * small.upload_limbs - bits
        assert (words(ciphertext.planes) == (b + step // 2) // step % 2**bits << unused).all()


def test_evaluation_rounds_and_wraps_as_on_the_wire() -> None:
    generator = torch.Generator().manual_seed(8)
    weight = weights(4, 5)
    for limbs in (2, 3, 4):
        planes = torch.randint(0, 256, (limbs, 6, 5), generator=generator).to(torch.uint8)
        planes[:, 0] = 255
        y = words(planes) @ weight.numpy().astype(np.int64).T
        for reply in range(8, 8 * limbs + 1):
            linear = LinearParameters(5, 4, max_l1=100, max_l2=60.0, upload_bits=8 * limbs, reply_bits=reply)
            shift = 8 * limbs - reply
            wanted = ((y + (1 << shift >> 1)) % 2 ** (8 * limbs)) >> shift << -reply % 8
            assert (words(evaluate(weight, planes, linear)) == wanted).all()


def test_each_block_has_its_own_secret() -> None:
    public, linear = PublicMatrix(TOY, SEED, 4), LinearParameters(4, 2, max_l1=500, max_l2=250.0)
    ciphertext, key = encrypt_tokens(public, torch.zeros(48, 4, dtype=torch.int32), linear)
    b = words(ciphertext.planes).reshape(3, 16, 4)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        # under one secret the difference of two encryptions of zero would be as small as their errors
        difference = (b[one] - b[other] + 2**31) % 2**32 - 2**31
        assert np.abs(difference).max() > 2 * ERROR_BOUND
    assert len(key._secrets) == 3


def test_secret_works_for_one_encryption() -> None:
    public, linear = PublicMatrix(TOY, SEED, 4), LinearParameters(4, 2, max_l1=500, max_l2=250.0)
    x = torch.ones(16, 4, dtype=torch.int32)
    secret = keygen(TOY)
    encrypt(public, [secret], x, linear)
    with pytest.raises(SecurityError, match="already used"):
        encrypt(public, [secret], x, linear)
    twice = keygen(TOY)
    with pytest.raises(SecurityError, match="already used"):
        encrypt(public, [twice, twice], torch.ones(32, 4, dtype=torch.int32), linear)


@pytest.mark.parametrize("wrong", [np.ones((2, 16), dtype=np.int8), SEED, None])
def test_only_one_time_secrets_encrypt(wrong: object) -> None:
    linear = LinearParameters(4, 2, max_l1=500, max_l2=250.0)
    with pytest.raises(SecurityError, match="OneTimeSecret"):
        encrypt(PublicMatrix(TOY, SEED, 4), [wrong], torch.ones(3, 4, dtype=torch.int32), linear)  # type: ignore[list-item]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_one_secret_per_block_is_wanted(count: int) -> None:
    linear = LinearParameters(4, 2, max_l1=500, max_l2=250.0)
    secrets = [keygen(TOY) for _ in range(count)]
    with pytest.raises(InputError, match="one secret per"):
        encrypt(PublicMatrix(TOY, SEED, 4), secrets, torch.ones(17, 4, dtype=torch.int32), linear)
    assert all(secret.spend() is not None for secret in secrets)  # a refusal spends nothing


def test_key_shows_nothing_stays_here_and_decrypts_every_reply() -> None:
    weight = weights(3, 4)
    linear = LinearParameters.from_weight(weight)
    public = PublicMatrix(TOY, SEED, 4)
    x = inputs(9, linear)
    ciphertext, key = encrypt_tokens(public, x, linear)
    assert repr(key) == "<DecryptionKey>"
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(SecurityError, match="copied"):
            duplicate(key)
    for other in (weight, -weight):
        hint = Hint.from_coefficients(TOY, setup(other, public))
        noise = decrypt(key, hint, evaluate(other, ciphertext.planes, linear), linear) - products(x, other)
        assert noise.abs().max() <= linear.noise_bound


def test_zero_tokens_come_back_as_exact_zeros() -> None:
    weight = weights(6, 10)
    linear = LinearParameters.from_weight(weight, 24, 24)
    x = torch.randn(20, 10, generator=torch.Generator().manual_seed(9))
    x[[0, 7, 19]] = 0
    integers, scale = encode(x, linear.input_bound)
    y = decode(round_trip(TOY, weight, integers, linear), scale)
    assert (y[[0, 7, 19]] == 0).all()
    wanted = x.double() @ weight.double().t()
    others = [row for row in range(20) if row not in (0, 7, 19)]
    room = scale * (linear.noise_bound + 0.5 * linear.max_l1)
    assert ((y - wanted).abs() <= room + 1e-6 * wanted.abs())[others].all()
    assert (y[others] != 0).any(dim=1).all()


@pytest.mark.parametrize("x", [torch.ones(3, 4), torch.ones(3, 5).int(), torch.ones(0, 4).int(), torch.ones(4).int()])
def test_malformed_plaintext_is_refused(x: torch.Tensor) -> None:
    linear = LinearParameters(4, 2, max_l1=500, max_l2=250.0)
    with pytest.raises(InputError, match="plaintext must be"):
        encrypt_tokens(PublicMatrix(TOY, SEED, 4), x, linear)


def test_matrix_with_too_few_rows_is_refused() -> None:
    linear = LinearParameters(4, 2, max_l1=500, max_l2=250.0)
    with pytest.raises(InputError, match="rows"):
        encrypt_tokens(PublicMatrix(TOY, SEED, 3), torch.ones(3, 4, dtype=torch.int32), linear)


def test_malformed_replies_and_strange_hints_are_refused() -> None:
    weight = weights(3, 4)
    linear = LinearParameters.from_weight(weight, 32, 24)
    public = PublicMatrix(TOY, SEED, 4)
    ciphertext, key = encrypt_tokens(public, inputs(9, linear), linear)
    hint, reply = Hint.from_coefficients(TOY, setup(weight, public)), evaluate(weight, ciphertext.planes, linear)
    for bad in (reply[:2], reply[:, :8], reply[:, :, :2], reply.int(), reply[0]):
        with pytest.raises(WorkerError, match="reply"):
            decrypt(key, hint, bad, linear)
    for strange in (
        Hint.from_coefficients(test_insecure_parameters(32, 1), setup(weight, public)),
        Hint.from_coefficients(TOY, setup(weight[:2], public)),
    ):
        with pytest.raises(InputError, match="hint"):
            decrypt(key, strange, reply, linear)
    with pytest.raises(InputError, match="other inputs"):
        decrypt(key, hint, reply, LinearParameters.from_weight(weight, 24, 24))
    for planes in (ciphertext.planes[:3], ciphertext.planes.int(), ciphertext.planes[:, :, :3]):
        with pytest.raises(InputError, match="ciphertext"):
            evaluate(weight, planes, linear)
    with pytest.raises(InputError, match="weight"):
        evaluate(weight[:2], ciphertext.planes, linear)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_small_circuit_decrypts_within_its_bound(data: st.DataObject) -> None:
    ring = data.draw(st.sampled_from([(4, 1), (8, 3), (16, 2)]))
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    byte = st.one_of(st.integers(-128, 127), st.sampled_from([-128, 127, 0]))
    flat = data.draw(st.lists(byte, min_size=rows * columns, max_size=rows * columns))
    weight = torch.tensor(flat, dtype=torch.int8).view(rows, columns)
    upload = data.draw(st.integers(16, 32))
    linear = LinearParameters.from_weight(weight, upload, data.draw(st.integers(8, upload)))
    tokens, bound = data.draw(st.integers(1, 40)), linear.input_bound
    value = st.one_of(st.integers(-bound, bound), st.sampled_from([-bound, bound, 0]))
    column = torch.tensor(data.draw(st.lists(value, min_size=tokens, max_size=tokens)))  # [T]
    x = column[:, None] * torch.tensor([1, -1, 0, 1, 1, -1])[:columns]  # [T, in]
    noise = round_trip(test_insecure_parameters(*ring), weight, x, linear) - products(x, weight)
    assert noise.abs().max() <= linear.noise_bound
