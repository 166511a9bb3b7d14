"""What precision costs and gives on the small Llama: gradients, training curves and bytes per token beside plaintext's.

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
from hecompile.cli.demo_run import RECIPE
from hecompile.compiler.linear import compile_checkpoint
from hecompile.errors import InputError
from hecompile.models import PRIVATE_TRAIN, TINY_LLAMA
from hecompile.runtime.client.encrypted_model import EncryptedCausalLM
from hecompile.runtime.client.products import EncryptedProducts
from hecompile.runtime.client.session import load_tokenizer, open_session
from hecompile.runtime.model.adapter import AdapterModel
from hecompile.runtime.model.data import PadToBucket, eos_and_pad, load_examples
from hecompile.runtime.model.plaintext import PlaintextPeftModel
from hecompile.runtime.recipes.training import load_recipe
from hecompile.runtime.training.comparison import compare_losses
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
Training curves: models/recipes/demo.yaml with {changes}, {steps} steps,
encrypted and in plaintext from the same initial adapter in the same order, for some seeds of adapter, order and dropout.
*In nats*, *in %*: the largest deviation of the loss at any step; *smoothed*: in %, of its mean over {window} steps.
*Every step*: the loss of each step's batch of {batch} lines is within 1 % of plaintext, or 0.01 nats where that is more;
*worst* is the largest deviation in units of that tolerance. Runs of one setting differ, for encryption errors do.
"""


def run(quick: bool) -> str:
    """Markdown: the table of gradients, the table of training curves, a plot of the deviations."""
    steps = QUICK_STEPS if quick else int(os.environ.get("HECOMPILE_BENCHMARK_STEPS", STEPS))
    gradient_settings, training_settings = ([(8, 8.0)],) * 2 if quick else (GRADIENT_SETTINGS, TRAINING_SETTINGS)
    batch = 2 if quick else BATCH_SIZE
    gradient_rows = [gradient_row(weights, bits, batch) for weights, bits in gradient_settings]
    changes = [*SCHEDULE, *QUIETLY, f"training.max_steps={steps}", f"training.per_device_train_batch_size={batch}"]
    training_rows: list[list[object]] = []
    runs: list[Run] = []
    curves: dict[str, list[float]] = {}
    for seed in SEEDS[: 1 if quick else None]:
        rows, found, made = training(training_settings, [*changes, f"training.seed={seed}"], batch)
        runs += made
        training_rows += [[seed, *row] for row in rows]
        curves |= {f"{name}, seed {seed}": curve for name, curve in found.items()}
    figure, axes = new_figure("loss of encrypted training against plaintext", "step", "difference, nats")
    for name, curve in curves.items():
        axes.plot(range(1, len(curve) + 1), curve, linewidth=0.8, label=name)
    axes.legend(fontsize=6, title="weight bits / precision")
    gradient_headings = ["weight bits", "precision", "bytes/token up", "down", "loss difference", "worst cosine", "median"]
    training_headings = [
        "seed", "weight bits", "precision", "bytes/token up", "down", "in nats", "in %", "smoothed", "worst",
        "every step",
    ]  # fmt: skip
    schedule = ", ".join(f"`{change}`" for change in SCHEDULE)
    return "\n\n".join(
        [
            GRADIENT_PROSE.format(batch=batch),
            table(gradient_headings, gradient_rows),
            TRAINING_PROSE.format(batch=batch, changes=schedule, steps=steps, window=WINDOW),
            table(training_headings, training_rows),
            _verdict(runs),
            save_plot(figure, "precision", "difference of the training loss to plaintext by step"),
        ]
    )


@dataclass(frozen=True)
class Run:
    """An encrypted run beside plaintext: the setting, bytes per token, and the largest deviations of the loss, smoothed (a
    fraction) and of any step (in units of the tolerance)."""

    setting: tuple[int, float]
    bytes_per_token: int
    smoothed: float
    worst: float


def _verdict(runs: list[Run]) -> str:
    """Which settings follow for every seed, smoothed and at every step, and what the cheapest of them sends."""

    def cheapest(follows: Callable[[Run], bool]) -> str:
        failing = {run.setting for run in runs if not follows(run)}
        following = [run for run in runs if run.setting not in failing]
        if not following:
            return "no setting"
        best = min(following, key=lambda run: run.bytes_per_token)
        return f"{best.setting[0]}-bit weights, precision {best.setting[1]:g}, {best.bytes_per_token} bytes per token"

    return (
        f"Fewest bytes for every seed: smoothed within 1 %, {cheapest(lambda run: run.smoothed <= 0.01)}; "
        f"at every step within 1 % or 0.01 nats, {cheapest(lambda run: run.worst <= 1)}."
    )


@contextmanager
def compiled(weight_bits: int, precision: float, batch_size: int) -> Iterator[Built]:
    """The small Llama compiled into a temporary folder."""
    with tempfile.TemporaryDirectory() as scratch:
        build = Path(scratch) / "build"
        compile_checkpoint(str(TINY_LLAMA), build, options(batch_size, LENGTH, precision, weight_bits))
        yield Built(TINY_LLAMA, build)


def gradient_row(weight_bits: int, precision: float, batch_size: int) -> list[object]:
    """Loss and gradients of one batch beside those of plaintext."""
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
    found = {}
    for name, parameter in model.adapter_state().items():
        assert parameter.grad is not None
        found[name] = parameter.grad
    return output.loss.item(), found


def training(
    settings: list[tuple[int, float]], changes: list[str], batch_size: int
) -> tuple[list[list[object]], dict[str, list[float]], list[Run]]:
    """Rows of the table, the differences of the loss by step for each setting, and what the verdict is made of."""
    runs: list[Run] = []
    rows: list[list[object]] = []
    curves: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        plain_metrics = Path(scratch) / "plaintext" / METRICS_FILE
        for weight_bits, precision in settings:
            run_directory = Path(scratch) / f"{weight_bits}-{precision:g}"
            with compiled(weight_bits, precision, batch_size) as built:
                _train(built, run_directory, changes, None if plain_metrics.exists() else plain_metrics.parent)
                traffic = built.traffic()
            own, reference = (
                [record["loss"] for record in read_metrics(path) if "loss" in record]
                for path in (run_directory / METRICS_FILE, plain_metrics)
            )
            comparison = compare_losses(run_directory / METRICS_FILE, plain_metrics)
            differences = [a - b for a, b in zip(own, reference, strict=True)]
            relative = 100 * max(abs(d) / b for d, b in zip(differences, reference, strict=True))
            smooth = max(abs(a / b - 1) for a, b in zip(_smoothed(own), _smoothed(reference), strict=True))
            runs.append(Run((weight_bits, precision), traffic.total, smooth, comparison.worst_ratio))
            deviation = [f"{comparison.largest_difference:.4f}", f"{relative:.2f}", f"{100 * smooth:.2f}"]
            deviation.append(f"{comparison.worst_ratio:.2f}")
            follows = "yes" if comparison.follows else "no"
            rows.append([weight_bits, precision, traffic.bytes_up, traffic.bytes_down, *deviation, follows])
            curves[f"{weight_bits} / {precision:g}"] = differences
    return rows, curves, runs


def _smoothed(losses: list[float]) -> list[float]:
    """Means of WINDOW steps, one for each step that has as many up to it."""
    window = min(WINDOW, len(losses))
    return [sum(losses[end - window : end]) / window for end in range(window, len(losses) + 1)]


def _train(built: Built, out: Path, changes: list[str], plaintext: Path | None) -> None:
    """One encrypted run into `out`, and one in plaintext from the same initial adapter into `plaintext` if that is given.

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
