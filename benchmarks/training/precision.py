"""Measure what precision costs and gives on the small Llama: gradients, training curves, bytes per token.

$HECOMPILE_BENCHMARK_STEPS sets the steps of each training run (120). About a minute for each row of the second
table on two cores.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.report import new_figure, save_plot, table
from benchmarks.training.builds import Built, options
from hecompile.bundles.client import ClientBundle
from hecompile.bundles.kinds import CLIENT, WORKER
from hecompile.bundles.worker import WorkerBundle
from hecompile.compiler.linear import compile_checkpoint
from hecompile.demonstrations.small import RECIPE
from hecompile.errors import InputError
from hecompile.inspection.linear import Traffic
from hecompile.models import PRIVATE_TRAIN, TINY_LLAMA
from hecompile.runtime.client.encrypted_model import EncryptedCausalLM
from hecompile.runtime.client.products import EncryptedProducts
from hecompile.runtime.client.session import load_tokenizer, open_session
from hecompile.runtime.model.adapter import AdapterModel
from hecompile.runtime.model.data import PadToBucket, eos_and_pad, load_examples
from hecompile.runtime.model.plaintext import PlaintextPeftModel
from hecompile.runtime.recipes.training import load_recipe
from hecompile.runtime.training.comparison import LossComparison, compare_losses
from hecompile.runtime.training.metrics import METRICS_FILE, read_metrics
from hecompile.runtime.training.train import run_training
from hecompile.runtime.transports import InProcessTransport
from hecompile.runtime.worker.worker import Worker

LENGTH, BATCH_SIZE = 48, 16
GRADIENT_SETTINGS = [(weights, bits) for weights in (8, 10) for bits in (4.0, 6.0, 8.0, 10.0)] + [(12, 8.0)]
TRAINING_SETTINGS = [(8, 8.0), (10, 8.0), (12, 8.0)]
SEEDS = (1, 2, 3)
SCHEDULE = ("training.learning_rate=1e-3", "training.warmup_steps=20")
QUIETLY = ("training.save_strategy=no", "training.disable_tqdm=true")
STEPS, QUICK_STEPS = 120, 2
WINDOW = 10
GRADIENT_PROSE = """\
## Precision against bytes, on the small Llama

The loss and the gradients of the LoRA matrices for one batch of private data ({batch} sequences), from one adapter state in
which neither A nor B is zero, against plaintext PEFT in float32: cosine of the matrix that fares worst, and median.
"""
TRAINING_PROSE = """\
Training curves: models/recipes/demo.yaml with {changes}, {steps} steps, encrypted and in plaintext from the same initial
adapter in the same order, for some seeds of adapter, order and dropout. *In nats*, *in %*: the largest deviation of the
loss at any step; *smoothed*: in %, of its mean over {window} steps. *Every step*: the loss of each step's batch of {batch}
lines is within 1 % of plaintext, or 0.01 nats where that is more; *worst* is the largest deviation in units of that
tolerance. Runs of one setting differ, for encryption errors do.
"""


def run(quick: bool) -> str:
    """Return Markdown: the table of gradients, the table of training curves, a plot of the deviations."""
    steps = QUICK_STEPS if quick else int(os.environ.get("HECOMPILE_BENCHMARK_STEPS", STEPS))
    gradient_settings, training_settings = ([(8, 8.0)],) * 2 if quick else (GRADIENT_SETTINGS, TRAINING_SETTINGS)
    batch = 2 if quick else BATCH_SIZE
    gradient_rows = [gradient_row(weights, bits, batch) for weights, bits in gradient_settings]
    changes = [*SCHEDULE, *QUIETLY, f"training.max_steps={steps}", f"training.per_device_train_batch_size={batch}"]
    runs = [run for seed in SEEDS[: 1 if quick else None] for run in train_all(training_settings, changes, batch, seed)]
    gradient_headings = ["weight bits", "precision", "bytes/token up", "down", "loss difference", "worst cosine"]
    training_headings = ["seed", "weight bits", "precision", "bytes/token up", "down", "in nats", "in %", "smoothed"]
    schedule = ", ".join(f"`{change}`" for change in SCHEDULE)
    return "\n\n".join(
        [
            GRADIENT_PROSE.format(batch=batch),
            table([*gradient_headings, "median"], gradient_rows),
            TRAINING_PROSE.format(batch=batch, changes=schedule, steps=steps, window=WINDOW),
            table([*training_headings, "worst", "every step"], [run.row() for run in runs]),
            _verdict(runs),
            _plot(runs),
        ]
    )


@dataclass(frozen=True)
class Run:
    """Hold an encrypted run beside plaintext: the setting, and the losses of both by step."""

    seed: int
    weight_bits: int
    precision: float
    traffic: Traffic
    losses: list[float]
    plaintext: list[float]
    comparison: LossComparison

    @property
    def setting(self) -> tuple[int, float]:
        return self.weight_bits, self.precision

    @property
    def differences(self) -> list[float]:
        """Return the differences of the losses by step, in nats."""
        return [a - b for a, b in zip(self.losses, self.plaintext, strict=True)]

    @property
    def smoothed(self) -> float:
        """Return the largest relative deviation of the losses' means over WINDOW steps."""
        pairs = zip(_smoothed(self.losses), _smoothed(self.plaintext), strict=True)
        return max(abs(a / b - 1) for a, b in pairs)

    def row(self) -> list[object]:
        """Return its row of the table."""
        relative = max(abs(d) / b for d, b in zip(self.differences, self.plaintext, strict=True))
        deviation = [f"{self.comparison.largest_difference:.4f}", f"{100 * relative:.2f}", f"{100 * self.smoothed:.2f}"]
        follows = [f"{self.comparison.worst_ratio:.2f}", "yes" if self.comparison.follows else "no"]
        return [self.seed, *self.setting, self.traffic.bytes_up, self.traffic.bytes_down, *deviation, *follows]


def _plot(runs: list[Run]) -> str:
    figure, axes = new_figure("loss of encrypted training against plaintext", "step", "difference, nats")
    for run in runs:
        label = f"{run.weight_bits} / {run.precision:g}, seed {run.seed}"
        axes.plot(range(1, len(run.losses) + 1), run.differences, linewidth=0.8, label=label)
    axes.legend(fontsize=6, title="weight bits / precision")
    return save_plot(figure, "precision", "difference of the training loss to plaintext by step")


def _verdict(runs: list[Run]) -> str:
    """Say which setting with the fewest bytes follows for every seed, smoothed and at every step."""

    def cheapest(follows: Callable[[Run], bool]) -> str:
        failing = {run.setting for run in runs if not follows(run)}
        following = [run for run in runs if run.setting not in failing]
        if not following:
            return "no setting"
        best = min(following, key=lambda run: run.traffic.total)
        return f"{best.setting[0]}-bit weights, precision {best.setting[1]:g}, {best.traffic.total} bytes per token"

    return (
        f"Fewest bytes for every seed: smoothed within 1 %, {cheapest(lambda run: run.smoothed <= 0.01)}; "
        f"at every step within 1 % or 0.01 nats, {cheapest(lambda run: run.comparison.worst_ratio <= 1)}."
    )


@contextmanager
def compiled(weight_bits: int, precision: float, batch_size: int) -> Iterator[Built]:
    """Compile the small Llama into a temporary folder."""
    with tempfile.TemporaryDirectory() as scratch:
        build = Path(scratch) / "build"
        compile_checkpoint(str(TINY_LLAMA), build, options(batch_size, LENGTH, precision, weight_bits))
        yield Built(TINY_LLAMA, build)


def gradient_row(weight_bits: int, precision: float, batch_size: int) -> list[object]:
    """Compare loss and gradients of one batch with those of plaintext."""
    try:
        with compiled(weight_bits, precision, batch_size) as built:
            return [weight_bits, precision, *_gradient_cells(built, batch_size)]
    except InputError as error:
        return [weight_bits, precision, f"cannot be reached: {error}", "", "", "", ""]


def _gradient_cells(built: Built, batch_size: int) -> list[object]:
    bundle = ClientBundle.open(built.build / CLIENT)
    worker = Worker(WorkerBundle.open(built.build / WORKER))
    encrypted = EncryptedCausalLM(bundle, EncryptedProducts(bundle, InProcessTransport(worker.exchange)))
    plain = PlaintextPeftModel.from_pretrained(TINY_LLAMA, encrypted.peft_config, (LENGTH,), batch_size)
    generator = torch.Generator().manual_seed(7)
    state = {name: 0.05 * torch.randn(p.shape, generator=generator) for name, p in encrypted.adapter_state().items()}
    tokenizer = load_tokenizer(bundle)
    examples = load_examples(PRIVATE_TRAIN, tokenizer, (LENGTH,))
    batch = PadToBucket((LENGTH,), eos_and_pad(tokenizer)[1])([examples[10 * i] for i in range(batch_size)])
    results = []
    for model in (encrypted, plain):
        model.load_adapter_state(state)
        results.append(_gradients(model, batch))
    (loss, own), (reference_loss, reference) = results
    cosines = torch.stack([F.cosine_similarity(own[n].flatten(), reference[n].flatten(), dim=0) for n in own])
    traffic = built.traffic()
    difference = f"{loss - reference_loss:+.4f} of {reference_loss:.3f}"
    return [traffic.bytes_up, traffic.bytes_down, difference, f"{cosines.min():.5f}", f"{cosines.median():.6f}"]


def _gradients(model: AdapterModel, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    output = model(batch["input_ids"], batch["attention_mask"], batch["labels"])
    assert output.loss is not None
    output.loss.backward()
    gradients = {}
    for name, parameter in model.adapter_state().items():
        assert parameter.grad is not None
        gradients[name] = parameter.grad
    return output.loss.item(), gradients


def train_all(settings: list[tuple[int, float]], changes: list[str], batch_size: int, seed: int) -> Iterator[Run]:
    """Train each (weight bits, precision) with this seed, and once in plaintext, from one initial adapter."""
    changes = [*changes, f"training.seed={seed}"]
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / "plaintext" / METRICS_FILE
        for weight_bits, precision in settings:
            own = Path(scratch) / f"{weight_bits}-{precision:g}" / METRICS_FILE
            with compiled(weight_bits, precision, batch_size) as built:
                _train(built, own.parent, changes, None if plain.exists() else plain.parent)
                traffic = built.traffic()
            losses, plain_losses = (
                [record["loss"] for record in read_metrics(path) if "loss" in record] for path in (own, plain)
            )
            yield Run(seed, weight_bits, precision, traffic, losses, plain_losses, compare_losses(own, plain))


def _smoothed(losses: list[float]) -> list[float]:
    """Return means of WINDOW steps, one for each step that has as many up to it."""
    window = min(WINDOW, len(losses))
    return [sum(losses[end - window : end]) / window for end in range(window, len(losses) + 1)]


def _train(built: Built, out: Path, changes: list[str], plaintext: Path | None) -> None:
    """Train encrypted into `out`, and in plaintext from the same initial adapter into `plaintext` if that is given.

    The initial adapter depends on the recipe's seed alone, so that one plaintext run serves all settings.
    """
    overrides = [*changes, f"model={built.build / CLIENT}", f"worker_bundle={built.build / WORKER}"]
    recipe = load_recipe(RECIPE, [*overrides, f"training.output_dir={out}"])
    with open_session(recipe) as session:
        initial = {name: value.detach().clone() for name, value in session.model.adapter_state().items()}
        run_training(session.model, session.tokenizer, recipe)
    if plaintext is not None:
        model = session.model
        plain = PlaintextPeftModel.from_pretrained(
            built.checkpoint, model.peft_config, model.sequence_buckets, model.batch_size
        )
        plain.load_adapter_state(initial)
        run_training(plain, session.tokenizer, load_recipe(RECIPE, [*overrides, f"training.output_dir={plaintext}"]))
