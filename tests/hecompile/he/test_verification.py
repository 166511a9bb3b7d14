"""Verified replies: honest ones pass, and lies of every kind are caught as often as the derivation says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hecompile.errors import InputError, SecurityError, VerificationError
from hecompile.he import fused
from hecompile.he.check_store import CheckStore, write_checks
from hecompile.he.check_tolerances import can_be_verified, check_count, tolerance
from hecompile.he.check_vectors import OLD_VARIANTS, VARIANTS, Checks
from hecompile.he.fused import RealKey, decrypt_reals, encrypt_reals
from hecompile.he.hints import Hint
from hecompile.he.parameters import LinearParameters, test_insecure_parameters
from hecompile.he.public_matrix import PublicMatrix
from hecompile.he.random.sampling import PublicSeed, SecretRandom
from hecompile.he.scheme import evaluate, setup
from hecompile.he.verification import Expectation, hint_is_right

TOY = test_insecure_parameters(16, 2)
SEED = PublicSeed(bytes(range(32)))
TOKENS, INPUTS, OUTPUTS = 24, 96, 130
Lie = Callable[[torch.Tensor], torch.Tensor]


def weights(rows: int, columns: int, seed: int = 5) -> torch.Tensor:
    return torch.randint(-127, 128, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def words_of(reply: torch.Tensor, linear: LinearParameters) -> np.ndarray:
    octets = np.zeros((*reply.shape[1:], 4), dtype=np.uint8)
    octets[..., 4 - linear.reply_bytes :] = reply.permute(1, 2, 0).numpy()
    return octets.view(np.int32)[..., 0]  # [T, out], multiples of the reply step


def reply_of(words: np.ndarray, linear: LinearParameters) -> torch.Tensor:
    octets = np.ascontiguousarray(words.astype(np.int32)).view(np.uint8).reshape(*words.shape, 4)
    return torch.from_numpy(octets[..., 4 - linear.reply_bytes :].copy()).permute(2, 0, 1).contiguous()


class Product:
    """One circuit of a toy ring, its checks, and products over it."""

    def __init__(self, upload_bits: int = 24, reply_bits: int = 16, inputs: int = INPUTS, outputs: int = OUTPUTS) -> None:
        self.weight = weights(outputs, inputs)
        self.linear = LinearParameters.from_weight(self.weight, upload_bits, reply_bits)
        self.public = PublicMatrix(TOY, SEED, inputs)
        self.hint = Hint.from_coefficients(TOY, setup(self.weight, self.public))
        self.checks = Checks.draw(self.weight, SecretRandom())

    def request(self, tokens: int = TOKENS, seed: int = 1) -> tuple[RealKey, torch.Tensor]:
        x = torch.randn(tokens, self.linear.in_features, generator=torch.Generator().manual_seed(seed))
        ciphertext, key = encrypt_reals(self.public, x, self.linear, checks=self.checks)
        return key, evaluate(self.weight, ciphertext.planes, self.linear)

    def accepts(self, key: RealKey, reply: torch.Tensor) -> bool:
        try:
            decrypt_reals(key, self.hint, reply, self.linear)
        except VerificationError:
            return False
        return True


@pytest.mark.parametrize(
    ("upload_bits", "reply_bits"), [(32, 32), (32, 16), (24, 24), (24, 16), (23, 22), (21, 12), (16, 16)]
)
@pytest.mark.parametrize("tokens", [1, 16, 40])
def test_an_honest_reply_passes(upload_bits: int, reply_bits: int, tokens: int) -> None:
    product = Product(upload_bits, reply_bits)
    key, reply = product.request(tokens)
    assert product.accepts(key, reply)
    assert (tolerance(product.linear) == 0) == (upload_bits == reply_bits)


def test_an_honest_reply_passes_where_tiles_have_several_lines_of_a_token() -> None:
    product = Product(inputs=1301, outputs=1302)
    key, reply = product.request()
    assert product.accepts(key, reply)


@pytest.mark.parametrize("shape", [(3, 5), (64, 64), (70, 200), (65, 2100), (10, 4500)])
@pytest.mark.parametrize("pieces", [16, 2048])
def test_the_sums_are_those_of_the_definition(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], pieces: int
) -> None:
    """Over features that fill no tile, several groups of outputs, and several pieces of tokens."""
    monkeypatch.setattr(fused, "_TOKENS", pieces)
    product = Product(21, 16, *shape)
    x = torch.randn(37, shape[0], generator=torch.Generator().manual_seed(3))
    ciphertext, key = encrypt_reals(product.public, x, product.linear, checks=product.checks)
    sent = np.zeros((*ciphertext.planes.shape[1:], 4), dtype=np.uint8)
    sent[..., 1:] = ciphertext.planes.permute(1, 2, 0).numpy()
    words = sent.view(np.int32)[..., 0].astype(np.int64)  # [T, in]
    expectation = key.expectation
    assert expectation is not None
    images = product.checks.images[expectation.variants].astype(np.int64)  # [T, checks, in]
    assert np.array_equal(expectation.sums, (images * words[:, None]).sum(axis=2).astype(np.int32))
    total = (
        (product.checks.images.astype(np.int64) * words.sum(axis=0)).sum(axis=2).astype(np.int32)
    )  # [variants, checks]
    assert np.array_equal(expectation.total_sums, total[None])
    again = Expectation.of_ciphertext(product.checks, product.linear, ciphertext.planes, SecretRandom())
    images = product.checks.images[again.variants].astype(np.int64)
    assert np.array_equal(again.sums, (images * words[:, None]).sum(axis=2).astype(np.int32))
    assert np.array_equal(again.total_sums, expectation.total_sums)
    assert expectation.sums.shape[1] == check_count(shape[1]) == -(-shape[1] // 2048)
    reply = evaluate(product.weight, ciphertext.planes, product.linear)
    received = words_of(reply, product.linear).astype(np.int64) * product.checks.vectors[expectation.variants]
    groups = [received[:, at : at + 2048].sum(axis=1) for at in range(0, shape[1], 2048)]
    deviation = np.abs((np.stack(groups, axis=1) - expectation.sums).astype(np.int32).astype(np.int64))
    assert deviation.max() <= tolerance(product.linear)
    assert product.accepts(key, reply)


def test_rounding_of_honest_replies_stays_far_within_the_tolerance() -> None:
    product = Product(outputs=2048, inputs=40)
    largest = 0
    for seed in range(20):
        key, reply = product.request(64, seed)
        assert product.accepts(key, reply) and key.expectation is not None
        words = words_of(reply, product.linear).astype(np.int64) * product.checks.vectors[key.expectation.variants]
        deviation = (words.sum(axis=1, keepdims=True) - key.expectation.sums).astype(np.int32).astype(np.int64)
        largest = max(largest, int(np.abs(deviation).max()))
    assert 0.25 < largest / tolerance(product.linear) < 0.75  # of 1280 draws the largest is near 3.4 of 8 deviations


def one_element(amount: int, linear: LinearParameters) -> Lie:
    def lie(reply: torch.Tensor) -> torch.Tensor:
        words = words_of(reply, linear).copy()
        words[5, 77] += amount
        return reply_of(words, linear)

    return lie


@pytest.mark.parametrize("times", [2, 5, 100])
def test_one_result_just_beyond_twice_the_tolerance_is_always_caught(times: int) -> None:
    product = Product()
    amount = (times * tolerance(product.linear) // product.linear.reply_step + 1) * product.linear.reply_step
    for seed in range(50):
        key, reply = product.request(seed=seed)
        for sign in (1, -1):
            assert not product.accepts(key, one_element(sign * amount, product.linear)(reply))


def test_a_result_just_beyond_the_noise_bound_is_caught() -> None:
    """The bound of the noise that decryption has anyway; larger than the tolerance at the widths of real layers."""
    product = Product(inputs=2048, outputs=1024)
    step = product.linear.reply_step
    amount = (product.linear.noise_bound // step + 1) * step
    assert amount > tolerance(product.linear)
    caught = 0
    for seed in range(8):
        key, reply = product.request(4 * VARIANTS, seed)
        words = words_of(reply, product.linear).copy()
        words[:, 7] += amount
        caught += not product.accepts(key, reply_of(words, product.linear))
    assert caught == 8


def test_replies_to_other_requests_are_caught() -> None:
    product, other = Product(), Product()
    other.weight = weights(OUTPUTS, INPUTS, seed=6)
    key, reply = product.request(seed=1)
    _, old = product.request(seed=1)  # the same plaintext, under another secret
    x = torch.randn(TOKENS, INPUTS)
    ciphertext, _ = encrypt_reals(product.public, x, product.linear)
    swapped = evaluate(other.weight, ciphertext.planes, product.linear)
    for lie in (old, swapped, torch.zeros_like(reply), reply.roll(1, dims=1), reply.roll(1, dims=2)):
        assert not product.accepts(key, lie)
    one_row = reply.clone()
    one_row[:, 7] = old[:, 7]
    assert not product.accepts(key, one_row)
    assert product.accepts(key, reply)


def test_the_message_names_numbers_and_no_secret() -> None:
    product = Product()
    key, reply = product.request()
    # A wrong token passes with a probability below a percent, four of 24 hardly ever.
    with pytest.raises(VerificationError, match=r"2[1-4] of 24 tokens .* deviate by more than rounding"):
        decrypt_reals(key, product.hint, torch.zeros_like(reply), product.linear)
    words = words_of(reply, product.linear).copy()
    words[5, [3, 9]] ^= -(2**31)
    passed = r"(1|1 or more in 1 groups of 24) of 24 tokens"  # one token, or its window where its own variant misses it
    with pytest.raises(VerificationError, match=passed):
        decrypt_reals(key, product.hint, reply_of(words, product.linear), product.linear)
    assert repr(product.checks) == "<Checks>"


def test_a_reply_is_not_checked_without_checks() -> None:
    product = Product()
    _, key = encrypt_reals(product.public, torch.randn(3, INPUTS), product.linear)
    assert key.expectation is None
    decrypt_reals(key, product.hint, torch.zeros(2, 3, OUTPUTS, dtype=torch.uint8), product.linear)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16])
def test_images_are_exact(dtype: torch.dtype) -> None:
    limits = torch.iinfo(dtype)
    weight = torch.full((4100, 9), limits.min, dtype=dtype)
    weight[::3] = limits.max
    checks = Checks.draw(weight, SecretRandom())
    exact = np.stack(
        [checks.vectors[:, at : at + 2048].astype(np.int64) @ weight[at : at + 2048].numpy().astype(np.int64)
         for at in range(0, 4100, 2048)], axis=1,
    )  # fmt: skip
    assert np.array_equal(checks.images, exact)
    assert set(np.unique(checks.vectors)) == {-2, -1, 1, 2}
    odd = checks.vectors % 2 == 1
    assert (odd.sum(axis=0) == VARIANTS // 2).all()  # of every output half of the factors see q/2
    together = (odd[:, None] & odd).sum(axis=2)[
        np.triu_indices(VARIANTS, 1)
    ]  # of two variants: 12/25 · 1/2 of the outputs
    assert np.abs(together - 4100 * 6 / 25).max() < 6 * np.sqrt(4100 * 6 / 25 * 19 / 25)
    counts = [(checks.vectors == value).sum() for value in (-2, -1, 1, 2)]
    assert max(abs(count - VARIANTS * 4100 / 4) for count in counts) < 500  # 6 standard deviations


def test_a_wrong_hint_is_caught() -> None:
    product = Product(inputs=40, outputs=2100)
    matrix = product.public.coefficients(slice(0, 40)).flatten(1)
    hint = setup(product.weight, product.public)
    assert hint_is_right(product.checks, hint, matrix)
    for row, column in ((0, 0), (2099, 31), (1024, 7)):
        wrong = hint.clone()
        wrong[row, column] += 1
        assert not hint_is_right(product.checks, wrong, matrix)
    wrong = hint.clone()
    wrong[[3, 5], 4] ^= -(2**31)
    draws = [Checks.draw(product.weight, SecretRandom()) for _ in range(12)]
    assert sum(hint_is_right(checks, wrong, matrix) for checks in draws) < 4  # missed once in 2^VARIANTS


def test_old_check_vectors_are_read_and_check_as_well_as_they_can(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    product = Product()
    draws = np.random.default_rng(1).choice([-2, -1, 1, 2], (OLD_VARIANTS, OUTPUTS)).astype(np.int32)
    images = draws.astype(np.int64) @ product.weight.numpy().astype(np.int64)
    np.save(tmp_path / "a.npy", np.concatenate([draws, images.astype(np.int32)], axis=1))
    store = CheckStore(tmp_path, ["a"])
    assert "1 in 256" not in caplog.text and "one output in 256" in caplog.text and "export again" in caplog.text
    assert store.left == 1
    product.checks = store.checks("a", product.linear)
    assert np.array_equal(product.checks.vectors, draws) and np.array_equal(product.checks.images[:, 0], images)
    key, reply = product.request()
    assert product.accepts(key, reply)
    for lie in (torch.zeros_like(reply), reply.roll(1, dims=2)):
        assert not product.accepts(key, lie)
    seen = int(np.flatnonzero((draws % 2 == 1).any(axis=0))[0])
    reply[-1, 7, seen] ^= 128
    assert not product.accepts(key, reply)


def test_stored_checks_come_back_and_are_private(tmp_path: Path) -> None:
    product = Product()
    path = write_checks(tmp_path / "checks", "a.b.forward", product.checks)
    assert path.stat().st_mode & 0o077 == 0 and path.parent.stat().st_mode & 0o077 == 0
    found = CheckStore(tmp_path / "checks").checks("a.b.forward", product.linear)
    assert np.array_equal(found.vectors, product.checks.vectors)
    assert np.array_equal(found.images, product.checks.images)
    with pytest.raises(InputError, match="export again"):
        CheckStore(tmp_path / "checks").checks("missing", product.linear)
    with pytest.raises(InputError, match="wanted"):
        CheckStore(tmp_path / "checks").checks("a.b.forward", LinearParameters.from_weight(weights(9, 9), 24, 16))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="cannot be read"):
        CheckStore(tmp_path / "checks").checks("a.b.forward", product.linear)


@pytest.mark.parametrize("wrong", [SEED, np.random.default_rng(0), None])
def test_checks_take_secret_randomness_only(wrong: object) -> None:
    with pytest.raises(SecurityError, match="SecretRandom"):
        Checks.draw(weights(4, 4), wrong)  # type: ignore[arg-type]


def test_replies_too_coarse_to_verify_are_refused() -> None:
    coarse = LinearParameters.from_weight(weights(2048, 64), 24, 8)
    assert not can_be_verified(coarse)
    with pytest.raises(SecurityError, match="cannot be verified: ask for a higher precision"):
        tolerance(coarse)
    assert can_be_verified(LinearParameters.from_weight(weights(2048, 64), 24, 16))


def test_checks_of_another_circuit_and_rings_beyond_the_kernels_are_refused() -> None:
    product, other = Product(), Product(outputs=64)
    with pytest.raises(InputError, match="of another circuit"):
        encrypt_reals(product.public, torch.randn(3, INPUTS), product.linear, checks=other.checks)
    large = PublicMatrix(test_insecure_parameters(4096, 1), SEED, INPUTS)
    with pytest.raises(SecurityError, match="choose a ring of the catalogue"):
        encrypt_reals(large, torch.randn(3, INPUTS), product.linear)


def test_a_tail_group_has_a_tolerance_of_its_own() -> None:
    product = Product(inputs=40, outputs=2049)
    allowed = product.checks.tolerances(product.linear)
    assert allowed.shape == (VARIANTS, 2)
    assert (allowed[:, 1] * 10 < allowed[:, 0]).all()


def test_tolerance_of_a_real_layer_is_near_its_noise_bound() -> None:
    linear = LinearParameters.from_weight(weights(2048, 2048), 24, 16)
    assert tolerance(linear) < linear.noise_bound
    assert 18 * tolerance(linear) < 2**32
    assert check_count(8192) == 4
