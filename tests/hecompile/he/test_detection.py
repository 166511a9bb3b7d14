"""Lies of a cheating worker are caught as often as the derivation in `hecompile.he.verification` says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hecompile.he.check_tolerances import result_tolerance, tolerance
from hecompile.he.check_vectors import MISSED, MOST_LIKELY, Checks
from hecompile.he.random.sampling import SecretRandom
from hecompile.he.verification import Expectation
from tests.hecompile.he.test_verification import OUTPUTS, Product, reply_of, words_of

HALF = -(2**31)
Lie = Callable[[np.ndarray, int], None]


def caught(lie: Lie, tokens: int, rounds: int = 60, **product_options: int) -> int:
    """Count how many of `rounds` requests, each with vectors of its own, catch the lie, told of words int32 `[T, out]`."""
    product, count = Product(**product_options), 0
    for seed in range(rounds):
        product.checks = Checks.draw(product.weight, SecretRandom())
        key, reply = product.request(tokens, seed)
        words = words_of(reply, product.linear).copy()
        lie(words, tolerance(product.linear))
        count += not product.accepts(key, reply_of(words, product.linear))
    return count


def results(outputs: list[int] | slice, amount: int = HALF, tokens: int | slice = 0) -> Lie:
    """Make a lie that adds an amount to some results, mod q."""

    def lie(words: np.ndarray, _: int) -> None:
        at = (tokens, outputs) if isinstance(tokens, int) else (tokens, np.arange(OUTPUTS)[outputs])
        words[at] = (words[at].astype(np.int64) + amount).astype(np.int32)

    return lie


def exchanged(words: np.ndarray, _: int) -> None:
    words[[3, 17]] = words[[17, 3]]


@pytest.mark.parametrize("tokens", [1, 8, 9, 64, 600])
@pytest.mark.parametrize("output", [0, 77, OUTPUTS - 1])
@pytest.mark.parametrize("bit", [31, 30, 29, 28])
def test_one_high_bit_of_one_result_is_always_caught(tokens: int, output: int, bit: int) -> None:
    """The top bit, q/2, is seen by odd factors alone: each output has some, and the sum of a window is seen by all."""
    rounds = 12 if tokens < 600 else 3
    assert caught(results([output], 1 << bit, tokens - 1), tokens, rounds) == rounds


def test_no_output_can_be_changed_by_half_the_modulus() -> None:
    """Of 130 outputs about one in two bundles had even factors in all of eight variants."""
    product = Product()
    key, reply = product.request(64)
    for output in range(OUTPUTS):
        lie = reply.clone()
        lie[-1, output % 64, output] ^= 128
        assert not product.accepts(key, lie), output


@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize("outputs", [[3, 9], [3, 9, 11, 100], slice(None)], ids=["two", "four", "all"])
def test_results_of_one_token_off_by_half_the_modulus_are_caught(tokens: int, outputs: list[int] | slice) -> None:
    """Signs alone would never see an even number of them. Missed with a probability of 2^-23."""
    assert caught(results(outputs), tokens) == 60


def test_the_bound_is_that_of_the_most_likely_parities() -> None:
    assert 2**-24 < MISSED < 2**-23 and MOST_LIKELY[:3] == (1, 0.5, 0.26) and MOST_LIKELY[8] < 0.013
    odd = Checks.draw(Product(outputs=2048, inputs=8).weight, SecretRandom()).vectors % 2 == 1
    parities, counts = np.unique(odd, axis=1, return_counts=True)
    assert counts.max() <= 2 and parities.shape[1] > 2044  # of 2048 outputs hardly any two have the same


def test_what_cancels_in_a_token_is_caught_by_the_sum() -> None:
    def opposite(words: np.ndarray, _: int) -> None:
        words[0, 3] += 1 << 28
        words[0, 9] -= 1 << 28

    assert caught(opposite, 1) == caught(opposite, 64) == 60


def test_the_sum_of_a_last_window_has_the_tolerance_of_its_own_tokens() -> None:
    """Of 513 tokens the last is a window of its own. Its check alone would miss this lie in a quarter of the requests."""

    def opposite(words: np.ndarray, tolerance_: int) -> None:
        words[512, 3] += 4 * tolerance_ // 2**16 * 2**16
        words[512, 9] -= 4 * tolerance_ // 2**16 * 2**16

    assert caught(opposite, 513, 16) == 16


@pytest.mark.parametrize("outputs", [[3], [3, 9]])
@pytest.mark.parametrize(("lying", "most"), [(2, 0.29), (8, 0.047), (64, 0.013)])
def test_what_cancels_in_the_sum_is_caught_by_the_tokens(outputs: list[int], lying: int, most: float) -> None:
    """Each token passes by its own variant with probability 1/2: the worst case for an even number of them."""
    rounds = 200
    missed = rounds - caught(results(outputs, HALF, slice(0, lying)), 64, rounds)
    assert missed <= most * rounds + 6 * np.sqrt(most * rounds)
    assert lying > 2 or missed > 25  # as derived, and not less


def test_no_output_is_blind_for_the_life_of_the_vectors() -> None:
    """An even number of q/2 cancels in the sum of tokens; each request draws other variants for the tokens."""
    product, passed = Product(), np.zeros(OUTPUTS, dtype=int)
    for seed in range(12):
        key, reply = product.request(16, seed)
        for output in range(OUTPUTS):
            lie = reply.clone()
            lie[-1, :8, output] ^= 128
            passed[output] += product.accepts(key, lie)
    # Of the eight variants of a request an output has even factors in all with probability C(18, 5) / C(26, 13) = 0.0008.
    assert passed.max() < 8 and passed.sum() < 0.2 * 12 * OUTPUTS


def test_a_token_exchanged_for_another_is_caught() -> None:
    assert caught(exchanged, 64) >= 59  # the sum of the window is right; both tokens pass with a probability below 2^-12


def test_tokens_that_are_exchanged_and_have_one_variant_pass_together_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of replies this coarse each check passes with probability 8 %, and so do two of two tokens, not with its square."""
    draw = Expectation.draw

    def one_variant(*request: Any) -> Expectation:
        expectation = draw(*request)
        expectation.variants[:] = expectation.drawn[0]
        return expectation

    monkeypatch.setattr(Expectation, "draw", one_variant)
    options = {"upload_bits": 24, "reply_bits": 8, "outputs": 8}
    single = 2 * tolerance(Product(**options).linear) / 2**32
    assert 0.07 < single < 0.09

    def neighbours(words: np.ndarray, _: int) -> None:
        words[[0, 1]] = words[[1, 0]]

    passed = 250 - caught(neighbours, 12, 250, **options)
    assert passed > 0.4 * 250 * single > 4 * 250 * single**2  # 20 are expected, where independent checks would pass 1.6


@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize(("times", "always"), [(0.1, False), (1.01, True), (20.0, True)])
def test_single_errors_around_the_tolerance(tokens: int, times: float, always: bool) -> None:
    amount = int(times * result_tolerance(Product().linear)) // 2**16 * 2**16

    def lie(words: np.ndarray, _: int) -> None:
        words[-1, 5] += amount

    assert caught(lie, tokens) == (60 if always else 0)  # times 2 where the factor is even: still within
