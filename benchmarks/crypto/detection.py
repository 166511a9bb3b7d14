"""Measure how often lies of a cheating worker are caught, beside what is derived."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import comb, log2, prod
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.report import section_main, table
from benchmarks.worker.linears import Linear, public_matrix, random_linear, random_rows, stored_hint
from hecompile.errors import VerificationError
from hecompile.he.check_tolerances import result_tolerance, tolerance
from hecompile.he.check_vectors import MISSED, MOST_LIKELY, SMALL, TOKEN_VARIANTS, VARIANTS, Checks
from hecompile.he.fused import decrypt_reals, encrypt_reals
from hecompile.he.hints import Hint
from hecompile.he.public_matrix import PublicMatrix
from hecompile.he.random.sampling import SecretRandom
from hecompile.he.scheme import evaluate
from hecompile.passes.offload.select_parameters import choose_ring

IN_FEATURES, OUT_FEATURES = 64, 96
TOKENS = (1, 64)
PROSE = """\
## Detection

A worker that lies in one way, in requests of 1 and 64 tokens, each checked by vectors drawn afresh: how often the reply is
refused, and the least share that `hecompile/he/verification.py` derives. *Cancel* means opposite errors in two results; an
even number of q/2 cancels in a sum of tokens. *Tolerance* is that of a single result (`check_tolerances.result_tolerance`):
an error above it passes with probability 2^-20 at most. Below it nothing is promised, and what is derived is the mean: of
the check of a token, to which rounding adds a normal eighth of the check's own tolerance.
"""

Words = NDArray[np.int64]


@dataclass(frozen=True)
class Lie:
    """Describe a lie: what it does to the words of a reply, int64 `[T, out]` in steps of the rounding, and its derived rate.

    `tell` takes words, the tolerance of a result and the modulus in the same steps. `derived` takes the number of tokens.
    """

    name: str
    tell: Callable[[Words, float, int], None]
    derived: Callable[[int], float]
    least_tokens: int = 1


def missed_by_tokens(count: int) -> float:
    """Return the largest probability that errors in `count` tokens, which cancel in their sum, pass."""
    chances = np.zeros(TOKEN_VARIANTS + 1)
    chances[0] = 1.0  # of having met so many distinct variants
    met = np.arange(TOKEN_VARIANTS + 1) / TOKEN_VARIANTS
    for _ in range(count):
        chances = chances * met + np.concatenate([[0.0], (chances * (1 - met))[:-1]])
    return float(chances @ np.array(MOST_LIKELY))


def _always(_: int) -> float:
    return 1.0


def _near(times: float, tokens: int) -> float:
    """Return the mean rate for an error of so many tolerances in one result: see PROSE."""
    linear = random_linear(IN_FEATURES, OUT_FEATURES).parameters
    times *= result_tolerance(linear) / tolerance(linear)
    beyond = [1 - NormalDist(times * factor, 1 / 8).cdf(1) for factor in (1, 2)]  # of an odd and of an even factor
    return 1 - prod((1 - rate) ** (VARIANTS // 2) for rate in beyond) if tokens <= SMALL else sum(beyond) / 2


def _one_token(_: int) -> float:
    return 1 - MISSED


def _some_tokens(tokens: int) -> float:
    return 1 - (MISSED if tokens == 1 else missed_by_tokens(tokens))


def _add(tokens: int | slice, outputs: int | list[int] | slice, share: float) -> Callable[[Words, float, int], None]:
    """Add that share of the modulus to some results of some tokens."""

    def tell(words: Words, _: float, modulus: int) -> None:
        words[tokens, outputs] += int(share * modulus)

    return tell


def _add_tolerances(times: float) -> Callable[[Words, float, int], None]:
    def tell(words: Words, tolerance_: float, _: int) -> None:
        words[0, 5] += int(times * tolerance_)

    return tell


def _cancel(words: Words, _: float, modulus: int) -> None:
    words[0, 3] += modulus // 16
    words[0, 9] -= modulus // 16


def _exchange(words: Words, *_: object) -> None:
    words[[0, 1]] = words[[1, 0]]


def _replay(words: Words, _: float, modulus: int) -> None:
    words[:] = np.random.default_rng(0).integers(0, modulus, words.shape)


LIES = (
    Lie("top bit of one result (q/2)", _add(0, 7, 1 / 2), _always),
    Lie("second bit of one result", _add(0, 7, 1 / 4), _always),
    Lie("q/2 in two results of a token", _add(0, [7, 9], 1 / 2), _one_token),
    Lie("q/2 in all results of a token", _add(0, slice(None), 1 / 2), _one_token),
    Lie("q/2 in one result of two tokens", _add(slice(0, 2), 7, 1 / 2), lambda _: 1 - missed_by_tokens(2), 2),
    Lie("q/2 in one result of every token", _add(slice(None), 7, 1 / 2), _some_tokens),
    Lie("q/2 in two results of two tokens", _add(slice(0, 2), [7, 9], 1 / 2), lambda _: 1 - missed_by_tokens(2), 2),
    Lie("q/2 in two results of every token", _add(slice(None), [7, 9], 1 / 2), _some_tokens),
    Lie("q/2 in all results of every token", _add(slice(None), slice(None), 1 / 2), _some_tokens),
    Lie("errors that cancel in a token", _cancel, _one_token),
    Lie("two tokens exchanged", _exchange, lambda _: 1 - 1e-3, 2),
    Lie("another reply", _replay, _one_token),
    Lie("1.01 times the tolerance in one result", _add_tolerances(1.01), lambda _: 1 - 2.0**-20),
    Lie("0.9 times the tolerance in one result", _add_tolerances(0.9), partial(_near, 0.9)),
    Lie("0.5 times the tolerance in one result", _add_tolerances(0.5), partial(_near, 0.5)),
    Lie("0.1 times the tolerance in one result", _add_tolerances(0.1), partial(_near, 0.1)),
)


def run(quick: bool) -> str:
    """Return Markdown: one row per lie, two columns per number of tokens."""
    rounds = 20 if quick else 1000
    linear = random_linear(IN_FEATURES, OUT_FEATURES)
    rates: dict[tuple[str, int], str] = {}
    for tokens in TOKENS:
        public = public_matrix(choose_ring(tokens), IN_FEATURES)
        with stored_hint(public, linear) as hint:
            for lie in LIES:
                if tokens >= lie.least_tokens:
                    rates[lie.name, tokens] = f"{_caught(lie, linear, public, hint, tokens, rounds) / rounds:.1%}"
    rows = []
    for lie in LIES:
        row: list[object] = [lie.name]
        for tokens in TOKENS:
            row += [rates.get((lie.name, tokens), ""), _share(lie.derived(tokens)) if tokens >= lie.least_tokens else ""]
        rows.append(row)
    headings = ["lie", *(f"{what} of {tokens} token(s)" for tokens in TOKENS for what in ("caught", "derived"))]
    return f"{PROSE}\nRounds: {rounds}. {_PARITIES}\n\n{table(headings, rows)}"


_PARITIES = f"Missed in one token: one in {comb(VARIANTS, VARIANTS // 2)}, or 2^{log2(MISSED):.1f}."


def _share(rate: float) -> str:
    if rate > 1 - 1e-9:
        return "all"
    if rate < 1e-9:
        return "none"
    return f"{rate:.1%}" if rate < 0.999 else f"1 - {1 - rate:.0e}"


def _caught(lie: Lie, linear: Linear, public: PublicMatrix, hint: Hint, tokens: int, rounds: int) -> int:
    """Count the rounds in which the lie is caught."""
    parameters, caught = linear.parameters, 0
    step = parameters.reply_step
    modulus = 2**32 // step
    for _ in range(rounds):
        checks = Checks.draw(linear.weight, SecretRandom())
        ciphertext, key = encrypt_reals(public, random_rows(tokens, IN_FEATURES), parameters, checks=checks)
        reply = evaluate(linear.weight, ciphertext.planes, parameters).numpy()  # uint8 [bytes, T, out]
        words = sum(plane.astype(np.int64) << (8 * place) for place, plane in enumerate(reply))
        lie.tell(words, result_tolerance(parameters) / step, modulus)
        planes = np.stack([((words % modulus) >> (8 * place)) & 255 for place in range(len(reply))]).astype(np.uint8)
        try:
            decrypt_reals(key, hint, torch.from_numpy(planes), parameters)
        except VerificationError:
            caught += 1
    return caught


if __name__ == "__main__":
    section_main("detection")
