"""Compare training curves on a real pretrained chat model: encrypted against plaintext, at every step and for some seeds.

The model is that of `make demo-real`, as are the data, the recipe and the options of the export. Each seed is trained
encrypted and in plaintext, from one initial adapter and in one order; one whose curves part is trained in plaintext with
bfloat16 products too. All is kept under build/curves/: a run that was interrupted goes on there from its last checkpoint;
delete the folder to begin again.
$HECOMPILE_BENCHMARK_SEEDS says how many seeds there are (3).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import peft
import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.report import ROOT, new_figure, save_plot, table
from hecompile.bundles.kinds import CLIENT, WORKER
from hecompile.checkpoint.tokenizer import load_tokenizer
from hecompile.compiler.linear import CompileOptions, compile_checkpoint
from hecompile.demonstrations.real import BATCH_SIZE, RECIPE, SEQUENCE_BUCKETS
from hecompile.files import write_whole
from hecompile.models.real import real_checkpoint
from hecompile.models.worlds.private_chat import chat_examples
from hecompile.models.worlds.private_world import to_jsonl
from hecompile.runtime.client.session import open_session
from hecompile.runtime.model.adapter import AdapterModel, load_adapter, save_adapter
from hecompile.runtime.model.plaintext import PlaintextPeftModel
from hecompile.runtime.recipes.training import Recipe, load_recipe
from hecompile.runtime.training.comparison import tolerance
from hecompile.runtime.training.metrics import METRICS_FILE, read_metrics
from hecompile.runtime.training.train import ADAPTER_DIR, run_training

SEEDS = 3
STEPS, QUICK_STEPS = 100, 2
SCHEDULE = ("training.learning_rate=2e-4",)
ENCRYPTED, PLAIN, BFLOAT16 = "encrypted", "plaintext", "bfloat16"
PROSE = """\
## Training curves of a real model

SmolLM2-135M-Instruct, the recipe of `make demo-real` with {changes}: {steps} steps of {batch} lines, for some seeds of
adapter and order. Every run of a seed begins with one adapter and takes the same batches. *encrypted*: through a worker in
this process, by the plan that `hecompile export` makes by default. It is compared with plaintext in float32, step by step.
Tolerance: 1 % of the loss, or 0.01 nats where that is more. *Outside*: steps that leave it. *Worst*: largest deviation in
units of the tolerance. *Held-out*: loss after the last step, beside that of plaintext. A seed with steps outside has a row
*bfloat16*, for comparison: plaintext whose products have bfloat16 factors (autocast), as is usual on a GPU.
"""


@dataclass(frozen=True)
class Curve:
    """Hold the losses of one run by step, in nats, those of plaintext, and the held-out loss at the end of each."""

    seed: int
    name: str
    losses: dict[int, float]
    plaintext: dict[int, float]
    heldout: float
    plain_heldout: float

    @property
    def differences(self) -> dict[int, float]:
        """Return the differences of the losses by step, in nats."""
        return {step: loss - self.plaintext[step] for step, loss in self.losses.items()}

    @property
    def ratios(self) -> dict[int, float]:
        """Return the deviations by step, in units of the tolerance."""
        return {step: abs(value) / tolerance(self.plaintext[step]) for step, value in self.differences.items()}

    @property
    def outside(self) -> list[int]:
        """Return the steps that leave the tolerance."""
        return [step for step, ratio in self.ratios.items() if ratio > 1]

    def row(self) -> list[object]:
        """Return its row of the table."""
        first, last = (self.plaintext[step] for step in (min(self.plaintext), max(self.plaintext)))
        largest = max(abs(value) for value in self.differences.values())
        ratios = self.ratios
        worst = max(ratios, key=lambda step: ratios[step])
        return [
            self.name, self.seed, len(self.losses), f"{first:.3f} → {last:.3f}", len(self.outside), f"{largest:.4f}",
            f"{ratios[worst]:.2f} (step {worst})", f"{self.heldout:.4f} / {self.plain_heldout:.4f}",
        ]  # fmt: skip


HEADINGS = ["run", "seed", "steps", "loss, plaintext", "outside", "largest, nats", "worst", "held-out"]


def run(quick: bool) -> str:
    """Return Markdown: a table of the runs, the steps that leave the tolerance, a plot of the differences."""
    bench = Bench(QUICK_STEPS if quick else STEPS)
    seeds = range(1, 2 if quick else 1 + int(os.environ.get("HECOMPILE_BENCHMARK_SEEDS", SEEDS)))
    curves = [bench.curve(seed, ENCRYPTED) for seed in seeds]
    curves += [bench.curve(curve.seed, BFLOAT16) for curve in curves if curve.outside]
    changes = ", ".join(f"`{change}`" for change in SCHEDULE)
    return "\n\n".join(
        [
            PROSE.format(changes=changes, steps=bench.steps, batch=BATCH_SIZE),
            table(HEADINGS, [curve.row() for curve in curves]),
            outside_table(curves),
            _plot(curves),
        ]
    )


def outside_table(curves: list[Curve]) -> str:
    """Write a table of the steps at which an encrypted run leaves the tolerance, and of what bfloat16 does at each."""
    other = {curve.seed: curve for curve in curves if curve.name == BFLOAT16}
    rows = [
        [curve.seed, step, f"{curve.plaintext[step]:.4f}", f"{curve.differences[step]:+.4f}", f"{curve.ratios[step]:.2f}",
         f"{other[curve.seed].differences[step]:+.4f}"]
        for curve in curves if curve.name == ENCRYPTED for step in curve.outside
    ]  # fmt: skip
    if not rows:
        return "No step of an encrypted run leaves the tolerance."
    return table(["seed", "step", "loss, plaintext", "encrypted", "in tolerances", "bfloat16"], rows)


def _plot(curves: list[Curve]) -> str:
    figure, axes = new_figure("training loss of a real model, less that of plaintext", "step", "difference, nats")
    for curve in curves:
        encrypted = curve.name == ENCRYPTED
        style = {"linewidth": 1.0} if encrypted else {"linewidth": 0.7, "linestyle": ":"}
        values = curve.differences
        label = f"{curve.name}, seed {curve.seed}"
        axes.plot(list(values), list(values.values()), color=f"C{curve.seed}", label=label, **style)
    limits = {step: max(tolerance(c.plaintext[step]) for c in curves) for step in curves[0].plaintext}
    for sign in (1, -1):
        axes.plot(list(limits), [sign * limit for limit in limits.values()], color="grey", linewidth=0.8)
    axes.legend(fontsize=6)
    return save_plot(figure, "curves", "difference of the training loss to plaintext by step; grey: the tolerance")


class Bench:
    """Hold the export and the runs, and make what is missing of them."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._store = ROOT / "build" / "curves"
        self._store.mkdir(parents=True, exist_ok=True)
        self._checkpoint = real_checkpoint(ROOT / "runs" / "demo-real")
        self._options = CompileOptions(batch_size=BATCH_SIZE, sequence_buckets=SEQUENCE_BUCKETS)
        for name, rows in zip(("train", "heldout"), chat_examples(self.tokenizer), strict=True):
            write_whole(self._store / f"{name}.jsonl", to_jsonl(rows).encode())

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self._checkpoint)

    @cached_property
    def build(self) -> Path:
        """Return the folder of the bundles, exported where they are missing."""
        build = self._store / "build"
        if not build.is_dir():
            _say("export")
            compile_checkpoint(str(self._checkpoint), build, self._options)
        return build

    def train(self, seed: int, name: str) -> None:
        """Train one run of a seed to its end, from its last checkpoint where it has one."""
        recipe = self._recipe(seed, name)
        output = recipe.training.output_dir
        if (output / ADAPTER_DIR).is_dir():
            return
        _say(f"{name}, seed {seed}, {self.steps} steps")
        if name == ENCRYPTED:
            with open_session(recipe) as session:
                self._run(session.model, seed, recipe, nullcontext)
        else:
            products = nullcontext if name == PLAIN else lambda: torch.autocast("cpu", torch.bfloat16)
            self._run(self._plaintext(), seed, recipe, products)

    def _run(
        self, model: AdapterModel, seed: int, recipe: Recipe, products: Callable[[], AbstractContextManager[object]]
    ) -> None:
        start = self._folder(seed) / "start"
        if not start.is_dir():
            save_adapter(model, start, self._checkpoint)
        load_adapter(model, start)
        with products():
            run_training(model, self.tokenizer, recipe, any(recipe.training.output_dir.glob("checkpoint-*")))

    def curve(self, seed: int, name: str) -> Curve:
        """Return a run beside that of plaintext, both trained to their ends where they are not yet."""
        for each in (name, PLAIN):
            self.train(seed, each)
        (losses, heldout), (plaintext, plain_heldout) = (self._figures(seed, each) for each in (name, PLAIN))
        return Curve(seed, name, losses, plaintext, heldout, plain_heldout)

    def _figures(self, seed: int, name: str) -> tuple[dict[int, float], float]:
        """Return the losses by step, and the last held-out loss."""
        records = read_metrics(self._folder(seed) / name / METRICS_FILE)
        losses = {record["step"]: record["loss"] for record in records if "loss" in record}
        return losses, [record["eval_loss"] for record in records if "eval_loss" in record][-1]

    def _folder(self, seed: int) -> Path:
        return self._store / f"{self.steps}-steps-seed-{seed}"

    def _recipe(self, seed: int, name: str) -> Recipe:
        return load_recipe(RECIPE, [
            f"model={self.build / CLIENT}", f"worker_bundle={self.build / WORKER}",
            f"data.train_file={self._store / 'train.jsonl'}", f"data.validation_file={self._store / 'heldout.jsonl'}",
            *SCHEDULE, f"training.max_steps={self.steps}", f"training.seed={seed}", f"training.data_seed={seed}",
            f"training.output_dir={self._folder(seed) / name}", "training.overwrite_output_dir=true",
        ])  # fmt: skip

    def _plaintext(self) -> PlaintextPeftModel:
        lora = asdict(self._options.lora) | {"target_modules": list(self._options.lora.target_modules)}
        config = peft.LoraConfig(**lora, task_type="CAUSAL_LM")
        return PlaintextPeftModel.from_pretrained(self._checkpoint, config, SEQUENCE_BUCKETS, BATCH_SIZE)


def _say(what: str) -> None:
    print(f"curves: {what}", file=sys.stderr, flush=True)
