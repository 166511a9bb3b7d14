"""Measure the price of computed hints: training steps of the small Llama with and without them, over a worker process.

python -m benchmarks hintless [--quick]
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from hecompile.bundles.client import ClientBundle
from hecompile.bundles.kinds import CLIENT, WORKER
from hecompile.compiler.linear import CompileOptions, compile_checkpoint
from hecompile.demonstrations.small import RECIPE
from hecompile.inspection.linear import circuits_without_gradient, hint_traffic
from hecompile.models import TINY_LLAMA
from hecompile.plan.hint_bits import Hints
from hecompile.runtime.client.session import open_session
from hecompile.runtime.recipes.training import load_recipe
from hecompile.runtime.training.comparison import StepSplit, step_split
from hecompile.runtime.training.metrics import METRICS_FILE, read_metrics
from hecompile.runtime.training.train import run_training
from hecompile.runtime.worker.process import worker_process

SEQUENCE_BUCKETS = (32, 48)
BATCHES, QUICK_BATCHES = (4, 16, 48), (4,)
STEPS, QUICK_STEPS = 8, 2
PROSE = """\
## Computed hints

`export llama --hints computed` stores nothing but the plan on the client; the worker computes W·A with every product,
exactly and in four bytes. One optimizer step of the small Llama (median of {steps}), the same recipe over a worker process,
both ways. The price falls with the tokens per batch, as a hint does not depend on their number. *Predicted*: the download by
`inspect`'s count.

| tokens/step | ring | hints | on the client | s/step | worker s | bytes down/token | time | download | predicted |
|---:|---|---|---:|---:|---:|---:|---:|---:|---:|
"""


def run(quick: bool) -> str:
    """Return Markdown: two rows per batch size; the last three columns are ratios to the row with stored hints."""
    batches, steps = (QUICK_BATCHES, QUICK_STEPS) if quick else (BATCHES, STEPS)
    return PROSE.format(steps=steps) + "\n".join(row for batch in batches for row in _rows(batch, steps)) + "\n"


def _rows(batch: int, steps: int) -> tuple[str, str]:
    with tempfile.TemporaryDirectory() as scratch:
        stored, tokens, bundle = _train(Path(scratch) / "stored", batch, steps, hints="stored")
        # One ring for both: the comparison is of where the hints come from.
        ring = f"{bundle.ring.ring_dim}x{bundle.ring.rank}"
        fetched, _, without = _train(Path(scratch) / "fetched", batch, steps, hints="computed", ring=ring)
        hints = hint_traffic(without.circuits, without.ring, circuits_without_gradient(without.graph())) / tokens
        megabytes = sum(path.stat().st_size for path in bundle.hints.glob("*.npy")) / 1e6
    ratios = (
        f"{fetched.seconds / stored.seconds:.1f}x",
        f"{fetched.bytes_down_per_token / stored.bytes_down_per_token:.2f}x",
        f"{1 + hints / stored.bytes_down_per_token:.2f}x",
    )
    first = [f"{tokens:.0f}", ring, "stored", f"{megabytes:.0f} MB", *_measured(stored), "1", "1", "1"]
    return _line(first), _line([f"{tokens:.0f}", ring, "computed", "0 MB", *_measured(fetched), *ratios])


def _measured(split: StepSplit) -> tuple[str, str, str]:
    return f"{split.seconds:.3f}", f"{split.worker:.3f}", f"{split.bytes_down_per_token:.0f}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _train(
    directory: Path, batch: int, steps: int, hints: Hints, ring: str | None = None
) -> tuple[StepSplit, float, ClientBundle]:
    """Train with the recipe of the demo: (what a step took, mean tokens per step, the bundle)."""
    options = CompileOptions(
        batch_size=batch, sequence_buckets=SEQUENCE_BUCKETS, hints=hints, weight_bits=8, ring=ring
    )
    compile_checkpoint(str(TINY_LLAMA), directory, options)
    with worker_process(directory / WORKER) as address:
        recipe = load_recipe(
            RECIPE,
            [
                f"model={directory / CLIENT}", f"worker={address}", f"training.output_dir={directory / 'run'}",
                f"training.max_steps={steps}", f"training.per_device_train_batch_size={batch}", "data.validation_file=null",
                "training.save_strategy=no", "training.disable_tqdm=true", "training.warmup_steps=1",
            ],
        )  # fmt: skip
        with open_session(recipe) as session:
            run_training(session.model, session.tokenizer, recipe)
    metrics = directory / "run" / METRICS_FILE
    tokens = [record["tokens"] for record in read_metrics(metrics) if "loss" in record]
    return step_split(metrics), sum(tokens) / len(tokens), ClientBundle.open(directory / CLIENT)
