"""Measure what the client saves: CPU seconds of its cryptography over those of the frozen linears themselves, by width."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor

from benchmarks.crypto.client_path import TRAINED
from benchmarks.report import new_figure, save_plot, table
from benchmarks.timing import paired
from benchmarks.worker.linears import llama_layer, parameters_of_shape, public_matrix, random_hint, random_rows
from hecompile.he.parameters import RingParameters
from hecompile.passes.offload.select_parameters import choose_ring

WIDTHS, TOKENS = (512, 1024, 2048, 4096, 8192), 512
TARGET = 1 / 5
PROSE = """\
## Client work saved

CPU seconds (all threads) of the client's cryptography for the seven frozen linears of one decoder layer, forward and
backward, and of computing them itself in float32; {tokens} tokens, key and value a quarter as wide as the hidden size,
ffn = 4 × hidden, ring {ring}. q/k/v share one upload and gate/up another, as in training. The float32 side computes with
the stacked matrices too. Target: at most 1/5 at 1B width (2048). Setup is not timed here: values in the hints' place
are random.
"""


def run(quick: bool) -> str:
    """Return Markdown with a table and a plot."""
    widths, tokens = ((64, 128), 32) if quick else (WIDTHS, TOKENS)
    ring = choose_ring(tokens)
    rows: list[list[object]] = []
    ratios = []
    for hidden in widths:
        encrypted = plain = 0.0
        for forward in llama_layer(hidden).values():
            for shape in (forward, forward[::-1]):
                own, reference = cpu_seconds_of_product(shape, ring, tokens, 1 if quick else 5)
                encrypted, plain = encrypted + own, plain + reference
        ratios.append(encrypted / plain)
        rows.append([hidden, 4 * hidden, 1e6 * encrypted / tokens, 1e6 * plain / tokens, ratios[-1]])
    figure, axes = new_figure("client cryptography / frozen linears in float32", "hidden size", "CPU seconds, ratio")
    axes.plot(widths, ratios, marker="o")
    axes.axhline(TARGET, linestyle="--", color="grey", label="target 1/5")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.legend()
    headings = ["hidden", "ffn", "encrypted: client CPU µs/token", "float32 CPU µs/token", "ratio"]
    plot = save_plot(figure, "client_saved", "client CPU seconds over float32 linears by hidden size")
    return "\n\n".join(
        [PROSE.format(tokens=tokens, ring=f"{ring.ring_dim} × {ring.rank}"), table(headings, rows), plot]
    )


def cpu_seconds_of_product(
    shape: tuple[int, int], ring: RingParameters, tokens: int, repeats: int
) -> tuple[float, float]:
    """Measure CPU seconds of one (in, out) product, (client cryptography, float32 product): medians of interleaved runs."""
    in_features, out_features = shape
    parameters = parameters_of_shape(in_features, out_features)
    public = public_matrix(ring, in_features)
    x = random_rows(tokens, in_features)
    weight = torch.randn(out_features, in_features)
    reply = torch.randint(0, 256, (parameters.reply_bytes, tokens, out_features), dtype=torch.uint8)
    with ExitStack() as stack:
        hint = stack.enter_context(random_hint(ring, parameters))

        def encrypted() -> Tensor:
            _, key = TRAINED.encrypt(public, x, parameters)
            return TRAINED.decrypt(key, hint, reply, parameters)

        calls: dict[str, Callable[[], object]] = {"encrypted": encrypted, "plain": lambda: x @ weight.t()}
        samples = paired(calls, repeats)
    return samples["encrypted"].cpu_seconds, samples["plain"].cpu_seconds
