"""Measure what a client computes in a training step at 1B size: CPU seconds by part, beside plaintext PEFT's.

$HECOMPILE_BENCHMARK_1B may name a folder with `checkpoint`, `build` and `build-remote` (of `--head remote`), of any depth:
what the layers take is scaled to 16 of them, and the page says so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from benchmarks.client.client_parts import HEAD, OUTSIDE_LAYERS, PARTS
from benchmarks.report import table
from benchmarks.training.builds import Built, llama_1b
from benchmarks.training.stepping import Batch, measure_steps
from hecompile.bundles.client import ClientBundle
from hecompile.bundles.kinds import CLIENT
from hecompile.compiler.options import Head

LAYERS, BATCH = 16, Batch(sequences=1, length=512)
QUICK_LAYERS, QUICK_BATCH = 1, Batch(sequences=2, length=32)
CPU_TARGET, RATIO_TARGET, GB_TARGET = 4.5, 0.16, 1.6
HEADS: tuple[Head, ...] = ("remote", "local")
HEADING = "## What the client computes"
PROSE = """\
CPU seconds (all threads) of one training step at Llama-3.2-1B's shape: {tokens} tokens, all of them scored, all seven
linears adapted, rank 8, weights of {weight_bits} bits, ring {ring}, output head {head}. Client, worker and
plaintext PEFT in float32 are processes of one run, in turn; medians of {rounds} rounds of {steps} steps. Measured on
{layers} layers; the columns of 16 layers {scaled}.
"""


def run(quick: bool) -> str:
    """Return Markdown: a table of parts, and the client's whole beside its targets."""
    layers, batch = (QUICK_LAYERS, QUICK_BATCH) if quick else (LAYERS, BATCH)
    tables = []
    for head in ("local",) if quick else HEADS:
        with llama_1b(layers, batch.sequences, batch.length, head=head) as built:
            tables.append(describe(built, batch, rounds=1 if quick else 2, steps=1))
    return "\n\n".join([HEADING, *tables])


def describe(built: Built, batch: Batch, rounds: int, steps: int) -> str:
    """Measure one plan and return its Markdown."""
    plan = ClientBundle.open(built.build / CLIENT).plan
    layers = sum(name.endswith("down_proj.forward") for name in plan.circuits)
    measured = measure_steps(built, batch, rounds, steps, parts=True)
    sides = (measured.encrypted, measured.plaintext)
    whole = [to_depth(side.parts, layers, outside) for side, outside in zip(sides, (OUTSIDE_LAYERS, (HEAD,)), strict=True)]
    rows: list[list[object]] = [
        [part, measured.encrypted.parts[part], whole[0][part], whole[1][part] or ""]
        for part in PARTS
        if any(side.parts[part] for side in sides)
    ]
    client, plain = (sum(parts.values()) for parts in whole)
    rows.append(["**a step**", sum(measured.encrypted.parts.values()), f"**{client:.2f}**", f"**{plain:.2f}**"])
    targets: list[list[object]] = [
        ["CPU seconds of the client, 16 layers", client, f"≤ {CPU_TARGET}"],
        ["over plaintext PEFT's", client / plain, f"≤ {RATIO_TARGET}"],
        ["resident memory at the peak, GB", measured.encrypted.peak / 1e9, f"≤ {GB_TARGET}"],
    ]
    prose = PROSE.format(
        tokens=batch.tokens,
        weight_bits=plan.weight_bits,
        ring=f"{plan.ring.ring_dim} × {plan.ring.rank}",
        head="remote" if any(name.startswith("lm_head") for name in plan.circuits) else "local",
        rounds=rounds,
        steps=steps + 1,
        layers=layers,
        scaled="are what was measured" if layers == LAYERS else "have what layers take scaled in proportion",
    )
    headings = ["CPU seconds", f"client, {layers} layers", "client, 16 layers", "plaintext PEFT, 16 layers"]
    return "\n\n".join([prose, table(headings, rows), table(["", "measured", "target"], targets)])


def to_depth(parts: Mapping[str, float], layers: int, outside: Collection[str]) -> dict[str, float]:
    """Scale the CPU seconds of the parts that are not `outside` the layers from that many to 16."""
    return {part: seconds * (1 if part in outside else LAYERS / layers) for part, seconds in parts.items()}
