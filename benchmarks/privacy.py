"""Utility, membership inference and accounting of private training on the small Llama; and what gradients per example cost.

Trains six adapters in plaintext and one through the encrypted worker: about a quarter of an hour of one core.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.builds import PRECISION
from benchmarks.membership import Attack, attack, losses, most_advantage
from benchmarks.report import new_figure, save_plot, section_main, table
from hecompile.compiler import CLIENT, WORKER, CompileOptions, compile_checkpoint
from models import TINY_LLAMA
from models.admissions import HELDOUT, TRAIN, admissions, by_rule, own
from models.private_world import to_jsonl
from passes.attach_lora import AttachLora
from runtime.adapter import load_adapter
from runtime.data import Examples, PadToBucket, eos_and_pad, load_examples
from runtime.evaluation import evaluate
from runtime.plaintext import PlaintextPeftModel
from runtime.privacy.accountant import Mechanism, spent_epsilon
from runtime.privacy.clipping import Grid, add_noise, clipped_sum
from runtime.privacy.ledger import PrivacyLedger, Subject
from runtime.privacy.promise import paper_epsilon, paper_mechanism, paper_noise
from runtime.recipe import load_recipe
from runtime.session import open_session
from runtime.train import run_training

RECIPE = TINY_LLAMA.parent / "recipes" / "private.yaml"
EPSILONS = (1.0, 2.0, 4.0, 8.0, math.inf)
ENCRYPTED, REPEATS = 8.0, 7
DELTA = 1e-4
BUCKETS, ROWS = (32, 48), 64
PLAIN = ("privacy=null", "training.gradient_accumulation_steps=1", "training.learning_rate=4e-3")
"""Of the runs without privacy: batches of 64, for it is noise that wants large ones."""
EVENTS = ((1.1, 0.25, 40, 1e-4), (0.8, 0.02, 1000, 1e-5), (2.0, 1.0, 50, 1e-5), (4.0, 0.1, 3000, 1e-6))
"""Noise multiplier, sampling rate, releases, δ."""
PROSE = """\
## Differential privacy

**Utility and membership inference.** `models/recipes/private.yaml` on {train} lines, one per patient, {epochs:g} epochs,
δ = {delta:g}: half of the lines ask for what is the clinic's rule, half for what is a patient's own. *Held-out*: other
patients, by the rule (loss in nats per token; exact match). *Remembered*: exact match on the training lines that ask for
a patient's own, which can only be remembered; guessing gets 14 %. The attacks ask which of {members} such lines were in
the training file and which of as many others were not, by the loss and by the loss less that of a reference model trained
without privacy on {train} lines of other patients: advantage (true less false positive rate, of the threshold that is
best on half of the lines, on the other half) and, in brackets, the area under the curve; an attack that knows nothing has
0 ± {error:.2f} and 0.5.
*Bound*: the most advantage that any attack can have. ε = ∞ is training without a privacy section, in batches of {rows}
(private steps: {batch}). Trained as plaintext PEFT in float32, but for the row *encrypted*, which went through the
encrypted worker (10-bit weights, precision {precision:g}); every adapter is measured in plaintext PEFT.
"""
PRICE = """\
**What it takes.** Beside the gradient of a batch of {rows} lines (plaintext PEFT, medians of {repeats}): the gradients of
each line in one pass take {ratio:.2f} times as long, clipping them on the grid {clip:.2f} times, and the noise for
{parameters} parameters, once a step, {noise:.2f} times.
"""
ACCOUNTING = """\
**The accountant** (dp-accounting's privacy loss distributions) beside Opacus' for some runs: ε at δ. Opacus' PRV
accountant is asked for an error of 0.01; RDP is an upper bound.
"""
PAPER = """\
**DP-LoRA as published** (`mode: paper`): what its formula says and what {steps} steps at its noise really spend at δ =
{delta:g} (sensitivity 2√2·C; Poisson samples of rate {rate:g}, and without counting on sampling, as published).
"""


@dataclass(frozen=True)
class Row:
    """One trained adapter, measured."""

    name: str
    epsilon: float
    spent: float
    noise: float
    heldout_loss: float
    heldout_match: float
    remembered: float
    by_loss: Attack
    by_reference: Attack | None

    def cells(self) -> list[object]:
        """For the table."""

        def shown(found: Attack | None) -> str:
            return "" if found is None else f"{found.advantage:.2f} ({found.auc:.2f})"

        return [
            self.name, _number(self.spent), _number(self.noise), f"{self.heldout_loss:.3f}",
            f"{100 * self.heldout_match:.1f} %",
            f"{100 * self.remembered:.1f} %", shown(self.by_loss), shown(self.by_reference),
            f"{most_advantage(self.epsilon, DELTA):.2f}",
        ]  # fmt: skip


def _number(value: float) -> str:
    return "∞" if math.isinf(value) else f"{value:.3f}"


class Sweep:
    """Trains and measures; `quick` takes a few lines and steps."""

    def __init__(self, scratch: Path, quick: bool) -> None:
        self.scratch, self.train = scratch, 128 if quick else TRAIN
        self.heldout = 16 if quick else HELDOUT
        self.changes = ["data.validation_file=null"]
        if quick:
            self.changes += ["training.max_steps=2", "training.per_device_train_batch_size=16"]
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(TINY_LLAMA)
        self.pad = eos_and_pad(self.tokenizer)[1]
        skip = self.train + 2 * self.heldout
        self.rows = admissions(self.train)
        self.other_rows = admissions(self.train, skip=skip)
        self.ruled = self.examples(by_rule(admissions(2 * self.heldout, skip=self.train)))
        self.members = self.examples(own(self.rows))
        self.others = self.examples(own(admissions(self.train, skip=skip + self.train)))
        self.reference: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None

    def examples(self, rows: list[dict[str, str]]) -> Examples:
        path = self.scratch / "examples.jsonl"
        path.write_text(to_jsonl(rows), encoding="utf-8")
        return load_examples(path, self.tokenizer, BUCKETS)

    def run(
        self, name: str, rows: list[dict[str, str]], epsilon: float, encrypted: Path | None = None
    ) -> PlaintextPeftModel:
        """Train on `rows`, in plaintext or over the bundles in `encrypted`; the adapter in a plaintext model."""
        directory = self.scratch / name
        directory.mkdir()
        data = directory / "train.jsonl"
        data.write_text(to_jsonl(rows), encoding="utf-8")
        changes = [*self.changes, f"data.train_file={data}", f"training.output_dir={directory / 'run'}"]
        changes += ["training.save_strategy=no", "training.disable_tqdm=true"]
        changes += PLAIN if math.isinf(epsilon) else (f"privacy.epsilon={epsilon}", f"privacy.delta={DELTA}")
        model = plaintext()
        if encrypted is None:
            changes.append("worker=tcp://127.0.0.1:1")  # not asked
            run_training(model, self.tokenizer, load_recipe(RECIPE, changes))
        else:
            changes += [f"model={encrypted / CLIENT}", f"worker_bundle={encrypted / WORKER}"]
            recipe = load_recipe(RECIPE, changes)
            with open_session(recipe) as session:
                load_adapter(model, run_training(session.model, session.tokenizer, recipe).adapter_dir)
        return model

    def measure(self, name: str, epsilon: float, model: PlaintextPeftModel) -> Row:
        """Utility and attacks."""
        heldout = evaluate(model, self.ruled, self.pad)
        members, others = losses(model, self.members, self.pad), losses(model, self.others, self.pad)
        assert heldout.exact_match is not None
        by_reference = None
        if self.reference is not None:
            by_reference = attack(members - self.reference[0], others - self.reference[1])
        spent, noise = self._spent(self.scratch / name / "train.jsonl", epsilon)
        remembered = evaluate(model, self.members, self.pad).exact_match or 0.0
        return Row(
            name,
            epsilon,
            spent,
            noise,
            heldout.loss,
            heldout.exact_match,
            remembered,
            attack(members, others),
            by_reference,
        )

    def _spent(self, data: Path, epsilon: float) -> tuple[float, float]:
        if math.isinf(epsilon) or not data.exists():
            return math.inf, 0.0
        with PrivacyLedger(data.with_name("train.jsonl.ledger"), Subject.of_file(data, self.train, DELTA)) as ledger:
            assert ledger.last is not None
            return ledger.spent(), ledger.last.noise_multiplier


def plaintext() -> PlaintextPeftModel:
    """The small Llama with the same fresh adapter every time."""
    lora = AttachLora()
    config = peft.LoraConfig(
        r=lora.r, lora_alpha=int(lora.lora_alpha), target_modules=list(lora.target_modules), task_type="CAUSAL_LM"
    )
    torch.manual_seed(1)
    return PlaintextPeftModel.from_pretrained(TINY_LLAMA, config, BUCKETS, ROWS)


def run(quick: bool) -> str:
    """Markdown: utility and attacks by ε with a plot, the accountants, the published mechanism, the price."""
    with tempfile.TemporaryDirectory() as scratch:
        sweep = Sweep(Path(scratch), quick)
        started = time.perf_counter()

        def finished(row: Row) -> Row:
            print(f"{time.perf_counter() - started:.0f} s: {' | '.join(map(str, row.cells()))}", flush=True)
            return row

        reference = sweep.run("reference", sweep.other_rows, math.inf)
        sweep.reference = losses(reference, sweep.members, sweep.pad), losses(reference, sweep.others, sweep.pad)
        rows = [finished(sweep.measure("none", math.inf, plaintext()))]
        for epsilon in EPSILONS[-2:] if quick else EPSILONS:
            name = "ε = ∞" if math.isinf(epsilon) else f"ε = {epsilon:g}"
            rows.append(finished(sweep.measure(name, epsilon, sweep.run(name, sweep.rows, epsilon))))
        build = Path(scratch) / "build"
        options = CompileOptions(batch_size=ROWS, sequence_buckets=BUCKETS, effective_bits=PRECISION, weight_bits=10)
        compile_checkpoint(str(TINY_LLAMA), build, options)
        name = f"ε = {ENCRYPTED:g}, encrypted"
        rows.append(finished(sweep.measure(name, ENCRYPTED, sweep.run(name, sweep.rows, ENCRYPTED, build))))
        price = _price(sweep, quick)
    return "\n\n".join([_utility(sweep, rows), price, _accounting(quick), _paper()])


def _utility(sweep: Sweep, rows: list[Row]) -> str:
    settings = load_recipe(RECIPE, ["worker=tcp://127.0.0.1:1"]).training
    headings = [
        "", "spent ε", "noise", "held-out loss", "exact match", "remembered", "attack by loss", "with a reference", "bound",
    ]  # fmt: skip
    prose = PROSE.format(
        train=sweep.train, epochs=settings.num_train_epochs, delta=DELTA, members=len(sweep.members), rows=ROWS,
        error=rows[0].by_loss.error, precision=PRECISION,
        batch=settings.per_device_train_batch_size * settings.gradient_accumulation_steps,
    )  # fmt: skip
    return "\n\n".join([prose, table(headings, [row.cells() for row in rows]), _plot(rows)])


def _plot(rows: list[Row]) -> str:
    trained = [row for row in rows if row.name != "none" and "encrypted" not in row.name]
    places, labels = range(len(trained)), [_number(row.epsilon).removesuffix(".000") for row in trained]
    figure, axes = new_figure("private training on the small Llama", "ε", "share")
    axes.plot(places, [row.heldout_match for row in trained], marker="o", label="held-out exact match (the rule)")
    axes.plot(places, [row.remembered for row in trained], marker="o", label="remembered of single patients")
    for name, found in (
        ("loss", [row.by_loss for row in trained]),
        ("reference", [row.by_reference for row in trained]),
    ):
        advantages = [math.nan if one is None else one.advantage for one in found]
        axes.plot(places, advantages, marker="s", linestyle="--", label=f"membership advantage, {name}")
    axes.plot(
        places, [most_advantage(row.epsilon, DELTA) for row in trained], ":", color="grey", label="bound on advantage"
    )
    axes.set_xticks(list(places), labels)
    axes.legend(fontsize=7)
    return save_plot(figure, "privacy", "held-out exact match and membership advantage by epsilon")


def _price(sweep: Sweep, quick: bool) -> str:
    model, repeats = plaintext(), 1 if quick else REPEATS
    batch: dict[str, Any] = PadToBucket(BUCKETS, sweep.pad)([sweep.members[index] for index in range(8 if quick else ROWS)])
    parameters, grid = model.adapter_state(), Grid.of(1.0, 1.0)
    taken: dict[str, list[float]] = {name: [] for name in ("batch", "each", "clip", "noise")}
    for _ in range(repeats + 1):  # the first is to warm up
        marks = [time.perf_counter()]
        torch.autograd.grad(model(**batch).loss, list(parameters.values()))
        marks.append(time.perf_counter())
        gradients = model.per_example_gradients(**batch).of_means()
        marks.append(time.perf_counter())
        sums = clipped_sum(gradients, grid)
        marks.append(time.perf_counter())
        add_noise(sums, 1.0)
        marks.append(time.perf_counter())
        for name, seconds in zip(taken, np.diff(marks), strict=True):
            taken[name].append(float(seconds))
    middle = {name: statistics.median(values[1:]) for name, values in taken.items()}
    return PRICE.format(
        rows=len(batch["labels"]), ratio=middle["each"] / middle["batch"], repeats=repeats,
        clip=middle["clip"] / middle["batch"], noise=middle["noise"] / middle["batch"],
        parameters=sum(value.numel() for value in parameters.values()),
    )  # fmt: skip


def _accounting(quick: bool) -> str:
    from opacus.accountants import PRVAccountant, RDPAccountant

    rows: list[list[object]] = []
    for noise, rate, releases, delta in EVENTS[: 1 if quick else None]:
        prv, rdp = PRVAccountant(), RDPAccountant()
        prv.history = rdp.history = [(noise, rate, releases)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = [prv.get_epsilon(delta, eps_error=0.01, delta_error=delta / 1000), rdp.get_epsilon(delta)]
        ours = spent_epsilon([(Mechanism(noise, rate), releases)], delta)
        rows.append([noise, rate, releases, f"{delta:g}", *(f"{value:.4f}" for value in (ours, *theirs))])
    headings = ["noise multiplier", "sampling rate", "releases", "δ", "ours", "Opacus PRV", "Opacus RDP"]
    return "\n\n".join([ACCOUNTING, table(headings, rows)])


def _paper(steps: int = 50, rate: float = 0.1, delta: float = 1e-5) -> str:
    rows: list[list[object]] = []
    for epsilon in (0.5, 1.0, 2.0, 4.0):
        noise = paper_noise(epsilon, delta)
        spent = [spent_epsilon([(paper_mechanism(noise, sampled), steps)], delta) for sampled in (rate, 1.0)]
        rows.append([f"{paper_epsilon(noise, delta):g}", f"{noise:.2f}", *(f"{value:.1f}" for value in spent)])
    headings = ["ε by the formula, per iteration", "noise", "really spent, sampled", "really spent, not sampled"]
    return "\n\n".join([PAPER.format(steps=steps, delta=delta, rate=rate), table(headings, rows)])


if __name__ == "__main__":
    section_main("privacy")
