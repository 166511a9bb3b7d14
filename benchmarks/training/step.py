"""Measure a training step at Llama-3.2-1B size: encrypted over plaintext PEFT, its split, memory, bytes on the wire.

$HECOMPILE_BENCHMARK_1B may name a folder with `checkpoint` and `build`, which alone is then measured; else both are made
for each of two plans (minutes, 15 GB of disk).
"""

from __future__ import annotations

import os

from benchmarks.report import table
from benchmarks.training.builds import DEFAULTS, ONE_B, PRECISION, WEIGHT_BITS, Built, llama_1b, stored_weight_bytes
from benchmarks.training.stepping import Batch, Side, Steps, measure_steps
from hecompile.bundles.client import ClientBundle
from hecompile.bundles.kinds import CLIENT
from hecompile.runtime.client.session import DEFAULT_ENGINE

LAYERS, BATCH = 16, Batch(sequences=1, length=512)
QUICK_LAYERS, QUICK_BATCH = 2, Batch(sequences=2, length=32)
RATIO_TARGET, BYTES_TARGET, CLIENT_GB_TARGET = 1.5, 3.6e6, 4.0
HEADING = "## One training step at 1B size"
PROSE = """\
Llama-3.2-1B's shape ({layers} layers) with random weights of {weight_bits} bits, precision {precision:g}, ring {ring},
LoRA of rank 8 on all seven linears, {tokens} tokens per step ({sequences} sequences of {length}, {micro} at a time),
gradients through all layers. Client and worker (engine `{engine}`) are processes that share the machine's cores, connected
by TCP; plaintext is PEFT on the same checkpoint in float32, a third process. Both sides train with
`hecompile.runtime.training.train.run_training`, in turn; medians of {steps} steps each.
"""
BY_DEFAULT = """\
### The same with the defaults of `hecompile export llama`

Weights of more than 8 bits take two bytes on the worker, and twice the products.
"""


def run(quick: bool) -> str:
    """Return Markdown: seconds and their split, CPU seconds and memory by process, bytes per token and their prediction."""
    layers, batch = (QUICK_LAYERS, QUICK_BATCH) if quick else (LAYERS, BATCH)
    rounds, steps = (1, 1) if quick else (2, 2)
    plans = [(PRECISION, WEIGHT_BITS)] if quick or os.environ.get(ONE_B) else [(PRECISION, WEIGHT_BITS), DEFAULTS]
    parts = []
    for precision, weight_bits in plans:
        with llama_1b(layers, batch.micro_batch or batch.sequences, batch.length, precision, weight_bits) as built:
            parts.append(describe(built, batch, measure_steps(built, batch, rounds, steps)))
    return "\n\n".join([HEADING, parts[0], *(text for part in parts[1:] for text in (BY_DEFAULT, part))])


def describe(built: Built, batch: Batch, measured: Steps) -> str:
    """Return the Markdown of one plan: seconds, memory, bytes."""
    encrypted, plain = measured.encrypted, measured.plaintext
    plan = ClientBundle.open(built.build / CLIENT).plan
    prose = PROSE.format(
        layers=sum(name.endswith("down_proj.forward") for name in plan.circuits),
        weight_bits=plan.weight_bits,
        engine=DEFAULT_ENGINE,
        precision=plan.effective_bits,
        ring=f"{plan.ring.ring_dim} × {plan.ring.rank}",
        tokens=batch.tokens,
        sequences=batch.sequences,
        length=batch.length,
        micro=batch.micro_batch or batch.sequences,
        steps=sum(len(steps) for steps in encrypted.rounds),
    )
    rows: list[list[object]] = [["a step", encrypted.seconds, plain.seconds]]
    rows += [[f"– {name}", seconds, ""] for name, seconds in measured.split.items()]
    rows.append(["encrypted / plaintext (median of pairs)", f"**{measured.ratio:.2f}**", f"target ≤ {RATIO_TARGET:g}"])
    rows.append(["loss of the first step", f"{encrypted.first_loss:.4f}", f"{plain.first_loss:.4f}"])
    processes = [
        ["client", encrypted.cpu_seconds, encrypted.peak / 1e9, f"≤ {CLIENT_GB_TARGET:g} GB"],
        ["worker", measured.worker_cpu_seconds, measured.worker_peak / 1e9, _worker_target(built)],
        ["plaintext PEFT", plain.cpu_seconds, plain.peak / 1e9, ""],
    ]
    return "\n\n".join(
        [
            prose,
            table(["seconds", "encrypted", "plaintext PEFT"], rows),
            table(["process", "CPU s per step", "peak memory, GB", "target"], processes),
            bytes_table(built, encrypted),
        ]
    )


def bytes_table(built: Built, encrypted: Side) -> str:
    """Show bytes per token on the wire, whole frames, beside what `inspect` predicts of the payload."""
    predicted = built.traffic()
    up, down = encrypted.per_token("bytes_up"), encrypted.per_token("bytes_down")
    rows = [
        ["up", f"{predicted.bytes_up:,}", f"{up:,.0f}", f"{100 * (up / predicted.bytes_up - 1):+.2f} %"],
        ["down", f"{predicted.bytes_down:,}", f"{down:,.0f}", f"{100 * (down / predicted.bytes_down - 1):+.2f} %"],
        ["both", f"{predicted.total:,}", f"{up + down:,.0f}", f"{100 * ((up + down) / predicted.total - 1):+.2f} %"],
    ]
    heading = (
        f"Bytes per token, forward and backward (target for 16 layers: at most {BYTES_TARGET:,.0f}, and 1 % between the "
        "two). The wire adds frame headers; rows without a gradient (a sequence's last, in the last layer) are not sent:"
    )
    return f"{heading}\n\n" + table(["", "predicted by `inspect`", "on the wire", "difference"], rows)


def _worker_target(built: Built) -> str:
    bundle = ClientBundle.open(built.build / CLIENT)
    return f"≤ 1.5 × {stored_weight_bytes(bundle) / 1e9:.2f} GB of weights + one batch"
