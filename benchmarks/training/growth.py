"""Measure growth: seconds and bytes per token of a training step against tokens per batch, hidden size and depth."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.report import new_figure, save_plot, table
from benchmarks.training.builds import forward_weights, llama_of
from benchmarks.training.stepping import Batch, measure_steps
from hecompile.bundles.client import ClientBundle
from hecompile.bundles.kinds import CLIENT

HIDDEN, LAYERS, TOKENS, LENGTH = 1024, 2, 512, 64
BY_TOKENS = (64, 128, 256, 512, 1024, 2048, 4096)
BY_HIDDEN = (256, 512, 1024, 2048)
BY_DEPTH = (1, 2, 4, 8)
PROSE = """\
## Growth

Training steps of random Llamas (1024 tokens in the vocabulary, ffn = 4 × hidden, all seven linears remote) over a worker
process, and plaintext PEFT beside them; one thing grows, the others stay at hidden {hidden}, {layers} layers, {tokens}
tokens per batch. Each point is a plan compiled for its batch. *Per weight*: per token and frozen weight of the
decoder layers, forward and backward.
"""
_HEADINGS = [
    "hidden",
    "layers",
    "tokens",
    "ring",
    "encrypted ms/token",
    "client crypto",
    "worker",
    "plaintext ms/token",
    "ratio",
    "kB/token",
    "ns/token/weight",
    "bytes/token/weight",
]


@dataclass(frozen=True)
class Point:
    """Hold one measured plan; times in seconds, and bytes, are per token."""

    hidden: int
    layers: int
    tokens: int
    ring: str
    seconds: float
    crypto: float
    worker: float
    plain: float
    ratio: float
    wire_bytes: float
    weights: int

    def row(self) -> list[object]:
        return [
            self.hidden,
            self.layers,
            self.tokens,
            self.ring,
            1e3 * self.seconds,
            1e3 * self.crypto,
            1e3 * self.worker,
            1e3 * self.plain,
            self.ratio,
            1e-3 * self.wire_bytes,
            1e9 * self.seconds / self.weights,
            self.wire_bytes / self.weights,
        ]


def run(quick: bool) -> str:
    """Return Markdown with a table per thing that grows, and one plot."""
    if quick:
        series = {"tokens per batch": [(128, 1, 16), (128, 1, 32)]}
        prose = PROSE.format(hidden=128, layers=1, tokens=16)
    else:
        series = {
            "tokens per batch": [(HIDDEN, LAYERS, tokens) for tokens in BY_TOKENS],
            "hidden size": [(hidden, LAYERS, TOKENS) for hidden in BY_HIDDEN],
            "layers": [(HIDDEN, layers, TOKENS) for layers in BY_DEPTH],
        }
        prose = PROSE.format(hidden=HIDDEN, layers=LAYERS, tokens=TOKENS)
    seen: dict[tuple[int, int, int], Point] = {}
    parts = [prose]
    for what, sizes in series.items():
        for size in sizes:
            if size not in seen:
                seen[size] = measure(*size, quick=quick)
        parts += [f"Against {what}:", table(_HEADINGS, [seen[size].row() for size in sizes])]
    plots = {what: [(_varying(size, what), seen[size]) for size in sizes] for what, sizes in series.items()}
    return "\n\n".join([*parts, *(_plot(what, points) for what, points in plots.items())])


def measure(hidden: int, layers: int, tokens: int, quick: bool) -> Point:
    """Compile and train one size."""
    length = min(LENGTH, tokens)
    batch = Batch(tokens // length, length)
    with llama_of(hidden, layers, batch.sequences, length) as built:
        bundle = ClientBundle.open(built.build / CLIENT)
        rounds, steps = (1, 1) if quick else (3, 2)
        measured = measure_steps(built, batch, rounds, steps)
        weights = forward_weights(bundle)
    encrypted, plain = measured.encrypted, measured.plaintext
    return Point(
        hidden,
        layers,
        tokens,
        f"{bundle.ring.ring_dim} × {bundle.ring.rank}",
        encrypted.seconds / tokens,
        encrypted.median("client_crypto_seconds") / tokens,
        encrypted.median("worker_seconds") / tokens,
        plain.seconds / tokens,
        measured.ratio,
        encrypted.per_token("bytes_up", "bytes_down"),
        weights,
    )


def _varying(size: tuple[int, int, int], what: str) -> int:
    hidden, layers, tokens = size
    return {"tokens per batch": tokens, "hidden size": hidden, "layers": layers}[what]


def _plot(what: str, points: list[tuple[int, Point]]) -> str:
    figure, axes = new_figure(f"one training step against {what}", what, "ns per token and weight")
    x = [value for value, _ in points]
    axes.plot(x, [1e9 * p.seconds / p.weights for _, p in points], marker="o", label="encrypted, seconds")
    axes.plot(x, [1e9 * p.plain / p.weights for _, p in points], marker="s", label="plaintext, seconds")
    axes.set_xscale("log", base=2)
    axes.set_xticks(x, [str(value) for value in x])
    axes.set_ylim(bottom=0)
    other = axes.twinx()
    other.plot(x, [p.wire_bytes / p.weights for _, p in points], marker="^", color="grey", label="encrypted, bytes")
    other.set_ylabel("bytes per token and weight")
    other.set_ylim(bottom=0)
    lines = [*axes.get_lines(), *other.get_lines()]
    axes.legend(lines, [str(line.get_label()) for line in lines], fontsize=8)
    return save_plot(figure, f"growth_{what.split()[0]}", f"cost per token and weight against {what}")
