"""Honest workers pass whatever W is like, and a single wrong result is caught from the stated amount on."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from hecompile.errors import InputError, SecurityError
from hecompile.he.check_tolerances import KINDS, Roundings, Rows, largest_tolerance, result_tolerance, tolerance
from hecompile.he.check_vectors import VARIANTS, Checks
from hecompile.he.fused import encrypt_reals
from hecompile.he.hints import Hint
from hecompile.he.parameters import LinearParameters
from hecompile.he.public_matrix import PublicMatrix
from hecompile.he.random.sampling import SecretRandom
from hecompile.he.scheme import setup
from hecompile.he.verification import Expectation
from hecompile.runtime.worker.engines import create_engine
from tests.hecompile.he.test_verification import SEED, TOY, Product, weights, words_of
from tests.support.bundles import write_bundle

SIZE = 96
TOKENS = 256


def _diagonal(values: list[int]) -> torch.Tensor:
    return torch.diag(torch.tensor([values[at % len(values)] for at in range(SIZE)])).to(torch.int8)


def _with_zeros() -> torch.Tensor:
    weight = weights(SIZE, SIZE)
    weight[::3] = 0
    return weight


ORDINARY = {"random": weights(SIZE, SIZE)}
EVEN = {
    "64 times the identity": _diagonal([64]),
    "minus 128 times the identity": _diagonal([-128]),
    "powers of two": _diagonal([1, 2, 4, 8, 16, 32, 64, -128, 0]),
    "all even": 2 * (weights(SIZE, SIZE) // 4),
    "rows of zeros": _with_zeros(),
    "zero": torch.zeros(SIZE, SIZE, dtype=torch.int8),
}
DEPENDENT = {
    "one row": weights(1, SIZE).repeat(SIZE, 1),
    "two rows": weights(2, SIZE).repeat(SIZE // 2, 1),
    "opposite rows": torch.cat([weights(SIZE // 2, SIZE), -weights(SIZE // 2, SIZE)]),
    "rank one": (torch.arange(SIZE)[:, None] % 9 - 4) * (weights(1, SIZE) // 8),
}
WEIGHTS = ORDINARY | EVEN | {name: weight.to(torch.int8) for name, weight in DEPENDENT.items()}


class Honest(Product):
    """One circuit with that weight, multiplied by a worker's engine."""

    def __init__(self, weight: torch.Tensor, folder: Path) -> None:
        self.weight = weight
        self.linear = LinearParameters.from_weight(weight, 24, 16)
        self.public = PublicMatrix(TOY, SEED, SIZE)
        self.hint = Hint.from_coefficients(TOY, setup(weight, self.public))
        self.checks = Checks.draw(weight, SecretRandom())
        self._engine = create_engine("torch", write_bundle(folder / "worker", {"a": (weight.t().numpy(), 24, 16)}))

    def is_accepted(self, tokens: int = TOKENS) -> bool:
        ciphertext, key = encrypt_reals(self.public, torch.randn(tokens, SIZE), self.linear, checks=self.checks)
        return self.accepts(key, torch.from_numpy(self._engine.evaluate("a.forward", ciphertext.planes.numpy())))

    def deviations(self, tokens: int = TOKENS) -> tuple[np.ndarray, np.ndarray]:
        """Return D of every token by every variant [variants, T], and of their total [variants], in tolerances."""
        ciphertext, key = encrypt_reals(self.public, torch.randn(tokens, SIZE), self.linear)
        reply = self._engine.evaluate("a.forward", ciphertext.planes.numpy())
        sent = (ciphertext.planes.numpy().astype(np.int64) << np.array([8, 16, 24])[:, None, None]).sum(axis=0)
        received = words_of(torch.from_numpy(reply), self.linear).astype(np.int64)
        sums = self.checks.vectors @ received.T - self.checks.images[:, 0].astype(np.int64) @ sent.T
        centred = sums.astype(np.int32) - self.checks.means(self.linear)
        allowed = np.maximum(self.checks.tolerances(self.linear), 1)
        total = np.abs(centred.sum(axis=1)) / self.checks.tolerances_of_total(self.linear, tokens).clip(1)[:, 0]
        assert key.tokens == tokens
        return np.abs(centred) / allowed, total


@pytest.mark.parametrize("name", WEIGHTS)
def test_an_honest_worker_passes_whatever_the_weight(name: str, tmp_path: Path) -> None:
    honest = Honest(WEIGHTS[name], tmp_path)
    assert all(honest.is_accepted(tokens) for tokens in (1, 9, TOKENS))
    of_tokens, of_total = honest.deviations()
    assert of_tokens.max() < 0.9 and of_total.max() < 0.7  # an eighth is one standard deviation, at most


@pytest.mark.parametrize("name", sorted(ORDINARY | EVEN))
def test_tolerances_are_no_larger_than_eight_standard_deviations(name: str, tmp_path: Path) -> None:
    honest = Honest(WEIGHTS[name], tmp_path)
    of_tokens, _ = honest.deviations(512)
    measured = np.sqrt(np.square(of_tokens).mean())
    assert measured == 0 if name == "zero" else 0.9 < 8 * measured < 1.1


def test_what_the_rows_are_like_is_what_lets_it_pass(tmp_path: Path) -> None:
    honest, refused = Honest(WEIGHTS["64 times the identity"], tmp_path), 0
    for _ in range(12):
        drawn = Checks.draw(honest.weight, SecretRandom())
        honest.checks = Checks(drawn.vectors, drawn.images)  # as a bundle of an earlier version has them
        refused += not honest.is_accepted(512)
    assert refused


def test_ordinary_weights_have_the_tolerance_of_their_squares() -> None:
    product = Product()
    squares = np.square(product.checks.vectors).sum(axis=1)
    assert [tolerance(product.linear, square) for square in squares] == list(product.checks.tolerances(product.linear)[:, 0])
    unknown = Roundings.of_unknown_rows(product.checks.vectors)
    assert all(np.array_equal(*both) for both in zip(unknown, product.checks.roundings, strict=True))


def test_rows_are_told_by_their_powers_of_two_and_directions() -> None:
    rows = [[1, 2, 3], [2, 4, 6], [-1, -2, -3], [0, 0, 0], [1, 2, 3], [4, 8, 12], [0, 5, 7], [0, 0, 0], [3, 6, 9]]
    weight = torch.nn.functional.pad(torch.tensor(rows, dtype=torch.int16), (200, 0))  # their beginnings are alike
    found = Rows(weight, SecretRandom())
    assert found.kinds.tolist() == [0, 1, 0, KINDS, 0, 2, 0, KINDS, 0]
    factors = np.array([[1, 2, -1, 2, 2, 1, 1, 1, -2]], dtype=np.int32)
    squares, sums = found.roundings(factors)
    assert squares[0, 0, :3].tolist() == [(3 + 2 + 1 + 1 + 2) ** 2 + 1, 0, 0] and not squares[0, 0, 3:].any()
    assert sums[0, 0, :3].tolist() == [1 - 1 + 2 + 1 - 2, 2, 1]


def test_they_are_stored_and_earlier_files_without_them_are_read(tmp_path: Path) -> None:
    weight = _diagonal([64, 3])
    checks, linear = Checks.draw(weight, SecretRandom()), LinearParameters.from_weight(weight, 24, 16)
    packed = checks.pack()
    found = Checks.unpack(packed, linear)
    assert np.array_equal(found.means(linear), checks.means(linear)) and checks.means(linear).any()
    assert np.array_equal(found.tolerances(linear), checks.tolerances(linear))
    earlier = Checks.unpack(packed[:, : SIZE + 4 * SIZE], linear)
    assert np.array_equal(earlier.images, checks.images)
    assert (earlier.tolerances(linear) > checks.tolerances(linear)).all()
    packed[0, -4 * 2 * KINDS : -4 * KINDS] = 255
    with pytest.raises(InputError, match="squares below zero"):
        Checks.unpack(packed, linear)


def test_rows_too_much_alike_to_be_verified_are_refused() -> None:
    weight = weights(1, 16).repeat(2048, 1)
    weight *= torch.arange(1, 2049)[:, None].remainder(2).to(torch.int8)
    linear = LinearParameters.from_weight(weight, 24, 16)
    vectors = np.full((VARIANTS, 2048), 2, dtype=np.int32)  # as good as never drawn
    checks = Checks(vectors, np.zeros((VARIANTS, 1, 16), dtype=np.int32), 0, Rows(weight, SecretRandom()).roundings(vectors))
    with pytest.raises(SecurityError, match="cannot be verified"):
        checks.tolerances(linear)


def test_the_amount_of_an_error_that_is_caught_follows_from_two_tails() -> None:
    linear = LinearParameters.from_weight(weights(2048, 64), 24, 16)
    deviation = tolerance(linear) / 8
    assert 13.4 * deviation < result_tolerance(linear) < 14 * deviation
    assert result_tolerance(LinearParameters.from_weight(weights(2048, 64), 16, 16)) == 0
    few = LinearParameters.from_weight(weights(3, 64), 24, 16)
    assert abs(result_tolerance(few) - (8 + math.sqrt(42 * math.log(2))) * largest_tolerance(few) / 8) < 2


@pytest.mark.parametrize("tokens", [1, 64])
def test_a_single_error_of_that_amount_is_caught_by_whatever_factor(tokens: int) -> None:
    """The honest part is within 5.4 deviations, but once in 2^21: the sum then exceeds 8 of them even by a factor of 1."""
    product, caught, rounds = Product(), 0, 100
    amount = -(-result_tolerance(product.linear) // product.linear.reply_step)
    for seed in range(rounds):
        key, reply = product.request(tokens, seed)
        words = words_of(reply, product.linear).copy()
        words[-1, seed] += (amount if seed % 2 else -amount) * product.linear.reply_step
        assert isinstance(key.expectation, Expectation)
        octets = np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape, 4)[..., 2:]
        caught += not product.accepts(key, torch.from_numpy(octets.copy()).permute(2, 0, 1).contiguous())
    assert caught == rounds
