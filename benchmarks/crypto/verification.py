"""Measure what verifying every reply costs the client."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.report import section_main, table
from benchmarks.timing import Samples, paired, ratio, threads
from benchmarks.worker.linears import llama_layer, public_matrix, random_linear, random_rows, stored_hint
from hecompile.he.check_tolerances import check_count, result_tolerance
from hecompile.he.check_vectors import Checks
from hecompile.he.fused import decrypt_reals, encrypt_reals
from hecompile.he.random.sampling import SecretRandom
from hecompile.he.scheme import evaluate
from hecompile.passes.offload.select_parameters import choose_ring

SHAPES = [shape for there in llama_layer(2048).values() for shape in (there, there[::-1])]
"""(in, out) of the circuits of a layer of Llama-3.2-1B, forward and backward."""

TOKENS = (512, 2048)
TARGET = 0.05
PROSE = f"""\
## Verification

Encrypting and decrypting with and without the check of the reply, one thread, in turn; *cost* is the median over pairs of
the time with it over the time without, minus one (target: at most {TARGET:.0%} of both together). *Layer* is all circuits
of a layer of Llama-3.2-1B, forward and backward: the sum of their medians with the check over the sum without. *Tolerance*:
the amount from which on an error of a single result is caught, in units of what the worker rounds to. *Noise bound*: of
decryption, in the same units.
"""


def run(quick: bool) -> str:
    """Return Markdown: one row per shape and number of tokens."""
    shapes, tokens = (((64, 96),), (40,)) if quick else (SHAPES, TOKENS)
    repeats = 2 if quick else 9
    rows = []
    for count in tokens:
        measured = [_row(*shape, count, repeats) for shape in shapes]
        rows += [row for row, _ in measured]
        sums = {key: sum(seconds[key] for _, seconds in measured) for key in measured[0][1]}
        costs = [sums["verified", what] / sums["plain", what] - 1 for what in ("encrypt", "decrypt")]
        costs.append(_both(sums, "verified") / _both(sums, "plain") - 1)
        rows.append(["layer", count, "", *map(_percent, costs), "", ""])
    headings = ["in × out", "tokens", "checks", "encrypt", "decrypt", "cost of both", "tolerance", "noise bound"]
    return f"{PROSE}\n\n{table(headings, rows)}"


def _row(
    in_features: int, out_features: int, tokens: int, repeats: int
) -> tuple[list[object], dict[tuple[str, str], float]]:
    """Measure one shape: its cells, and the median seconds of each half with and without the check."""
    linear = random_linear(in_features, out_features)
    parameters = linear.parameters
    public = public_matrix(choose_ring(tokens), in_features)
    checks = Checks.draw(linear.weight, SecretRandom())
    x = random_rows(tokens, in_features)
    with stored_hint(public, linear) as hint, threads(1):
        calls: dict[str, Callable[[], object]] = {}
        for name, own in (("plain", None), ("verified", checks)):
            ciphertext, key = encrypt_reals(public, x, parameters, checks=own)
            reply = evaluate(linear.weight, ciphertext.planes, parameters)
            calls[f"{name} encrypt"] = partial(encrypt_reals, public, x, parameters, checks=own)
            calls[f"{name} decrypt"] = partial(decrypt_reals, key, hint, reply, parameters)
        samples = paired(calls, repeats)
    both = {name: _sum(samples[f"{name} encrypt"], samples[f"{name} decrypt"]) for name in ("plain", "verified")}
    costs = [
        ratio(samples[f"verified {what}"].wall, samples[f"plain {what}"].wall) - 1 for what in ("encrypt", "decrypt")
    ]
    costs.append(ratio(both["verified"], both["plain"]) - 1)
    step = parameters.reply_step
    cells: list[object] = [f"{in_features} × {out_features}", tokens, check_count(out_features), *map(_percent, costs)]
    cells += [result_tolerance(parameters) / step, parameters.noise_bound / step]
    names = [(name, what) for name in ("plain", "verified") for what in ("encrypt", "decrypt")]
    return cells, {(name, what): samples[f"{name} {what}"].seconds for name, what in names}


def _percent(cost: float) -> str:
    return f"{100 * cost:+.1f} %"


def _both(seconds: dict[tuple[str, str], float], name: str) -> float:
    return seconds[name, "encrypt"] + seconds[name, "decrypt"]


def _sum(one: Samples, other: Samples) -> list[float]:
    return [a + b for a, b in zip(one.wall, other.wall, strict=True)]


if __name__ == "__main__":
    torch.manual_seed(0)
    section_main("verification")
