"""Measure utility, membership inference and accounting of private training on the small Llama, and gradients per example.

Trains six adapters in plaintext and one through the encrypted worker: about twenty minutes of one core. Adapters are kept in
build/privacy-benchmark until all are trained, so that an interrupted run goes on.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import peft
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.privacy.membership import Attack, attack, losses, most_advantage
from benchmarks.privacy.privacy_accounting import accountants, price, published
from benchmarks.report import ROOT, new_figure, save_plot, table
from benchmarks.training.builds import PRECISION
from hecompile.bundles.kinds import CLIENT, WORKER
from hecompile.compiler.linear import CompileOptions, compile_checkpoint
from hecompile.models import TINY_LLAMA
from hecompile.models.worlds.admissions import HELDOUT, TRAIN, admissions, by_rule, own
from hecompile.models.worlds.private_world import to_jsonl
from hecompile.passes.offload.attach_lora import AttachLora
from hecompile.runtime.client.session import open_session
from hecompile.runtime.model.adapter import load_adapter
from hecompile.runtime.model.data import Examples, PadToBucket, eos_and_pad, load_examples
from hecompile.runtime.model.evaluation import evaluate
from hecompile.runtime.model.plaintext import PlaintextPeftModel
from hecompile.runtime.privacy.ledger import PrivacyLedger, Subject
from hecompile.runtime.recipes.training import load_recipe
from hecompile.runtime.training.train import ADAPTER_DIR, run_training

KEPT = ROOT / "build" / "privacy-benchmark"
RECIPE = TINY_LLAMA.parent / "recipes" / "private.yaml"
EPSILONS = (1.0, 2.0, 4.0, 8.0, math.inf)
ENCRYPTED = 8.0
DELTA = 1e-4
BUCKETS, ROWS = (32, 48), 64
PRIVATE = (
    "training.per_device_train_batch_size=32", "training.gradient_accumulation_steps=4", "training.num_train_epochs=2.5",
)  # fmt: skip
"""Settings of the private runs: half the recipe's batch and epochs, for half the time."""
PLAIN_ROWS, UNTRAINED = 16, "untrained"
PLAIN = (
    "privacy=null", f"training.per_device_train_batch_size={PLAIN_ROWS}", "training.gradient_accumulation_steps=1",
    "training.learning_rate=4e-3", "training.num_train_epochs=5",
)  # fmt: skip
"""Settings of the runs without privacy: small batches, for only noise needs large ones."""
LORA = AttachLora(r=2, lora_alpha=4.0)
"""Noise is added to every parameter: few of them serve privacy best."""
PROSE = """\
## Differential privacy

**Utility and membership inference.** `models/recipes/private.yaml` on {train} lines, one per patient, {epochs:g} epochs in
batches of {batch}, δ = {delta:g}: most lines ask for what is the clinic's rule, one in eight for what is a patient's own.
*Held-out*: other patients, by the rule (loss in nats per token; exact match, of which knowing both remedies and guessing
gets half). *Remembered*: exact match on the training lines that ask for a patient's own, which can only be remembered;
guessing gets 14 %. The attacks ask which of {members} such lines were in the training file and which of as many others were
not, by the loss and by the loss less that of a reference model trained without privacy on {train} lines of other patients:
advantage (true less false positive rate, of the threshold that is best on half of the lines, on the other half) and, in
brackets, the area under the curve; an attack that knows nothing has 0 ± {error:.2f} and 0.5. *Bound*: the most advantage
that any attack can have. ε = ∞ is training without a privacy section, {passes:g} epochs in batches of {rows}. Trained as
plaintext PEFT in float32, but for the row *encrypted*, which went through the encrypted worker (10-bit weights, precision
{precision:g}); every adapter is measured in plaintext PEFT.
"""


@dataclass(frozen=True)
class Row:
    """Hold what was measured of one adapter."""

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
        """Return its row of the table."""

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
    """Train adapters and measure them; `quick` takes a few lines and steps."""

    def __init__(self, scratch: Path, quick: bool) -> None:
        self.scratch, self.train = scratch, 128 if quick else TRAIN
        self.heldout = 16 if quick else HELDOUT
        self.quick = ["training.max_steps=2", "training.gradient_accumulation_steps=1"] if quick else []
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
        model, adapter = plaintext(), directory / "run" / ADAPTER_DIR
        if adapter.is_dir():
            load_adapter(model, adapter)
            return model
        shutil.rmtree(directory, ignore_errors=True)  # cut off: its ledger knows of steps that nothing came of
        directory.mkdir(parents=True)
        data = directory / "train.jsonl"
        data.write_text(to_jsonl(rows), encoding="utf-8")
        changes = [f"data.train_file={data}", "data.validation_file=null", f"training.output_dir={directory / 'run'}"]
        changes += ["training.save_strategy=no", "training.disable_tqdm=true"]
        changes += PLAIN if math.isinf(epsilon) else (*PRIVATE, f"privacy.epsilon={epsilon}", f"privacy.delta={DELTA}")
        changes += self.quick
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
        """Measure the utility of an adapter, and the attacks on it."""
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
        if math.isinf(epsilon) or not epsilon:
            return epsilon, 0.0
        with PrivacyLedger(data.with_name("train.jsonl.ledger"), Subject.of_file(data, self.train, DELTA)) as ledger:
            assert ledger.last is not None
            return ledger.spent(), ledger.last.noise_multiplier


def plaintext() -> PlaintextPeftModel:
    """Load the small Llama with the same fresh adapter every time."""
    config = peft.LoraConfig(
        r=LORA.r, lora_alpha=int(LORA.lora_alpha), target_modules=list(LORA.target_modules), task_type="CAUSAL_LM"
    )
    torch.manual_seed(1)
    return PlaintextPeftModel.from_pretrained(TINY_LLAMA, config, BUCKETS, ROWS)


def run(quick: bool) -> str:
    """Return Markdown: utility and attacks by ε with a plot, the accountants, the published mechanism, the price."""
    with _kept(quick) as scratch:
        sweep = Sweep(scratch, quick)
        started = time.perf_counter()

        def finished(row: Row) -> Row:
            print(f"{time.perf_counter() - started:.0f} s: {' | '.join(map(str, row.cells()))}", flush=True)
            return row

        reference = sweep.run("reference", sweep.other_rows, math.inf)
        sweep.reference = losses(reference, sweep.members, sweep.pad), losses(reference, sweep.others, sweep.pad)
        rows = [finished(sweep.measure(UNTRAINED, 0.0, plaintext()))]
        for epsilon in EPSILONS[-2:] if quick else EPSILONS:
            name = "ε = ∞" if math.isinf(epsilon) else f"ε = {epsilon:g}"
            rows.append(finished(sweep.measure(name, epsilon, sweep.run(name, sweep.rows, epsilon))))
        build = scratch / "build"
        options = CompileOptions(
            LORA, batch_size=ROWS, sequence_buckets=BUCKETS, effective_bits=PRECISION, weight_bits=10
        )
        compile_checkpoint(str(TINY_LLAMA), build, options)
        name = f"ε = {ENCRYPTED:g}, encrypted"
        rows.append(finished(sweep.measure(name, ENCRYPTED, sweep.run(name, sweep.rows, ENCRYPTED, build))))
        examples = [sweep.members[index] for index in range(8 if quick else ROWS)]
        cost = price(plaintext(), PadToBucket(BUCKETS, sweep.pad)(examples), quick)
    return "\n\n".join([_utility(sweep, rows), cost, accountants(quick), published()])


@contextmanager
def _kept(quick: bool) -> Iterator[Path]:
    """Open a folder that is removed when all has gone well."""
    if quick:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
        return
    KEPT.mkdir(parents=True, exist_ok=True)
    yield KEPT
    shutil.rmtree(KEPT)


def _utility(sweep: Sweep, rows: list[Row]) -> str:
    settings = load_recipe(RECIPE, ["worker=tcp://127.0.0.1:1", *PRIVATE]).training
    plain = load_recipe(RECIPE, ["worker=tcp://127.0.0.1:1", *PLAIN]).training
    headings = [
        "", "spent ε", "noise", "held-out loss", "exact match", "remembered", "attack by loss", "with a reference", "bound",
    ]  # fmt: skip
    prose = PROSE.format(
        train=sweep.train, epochs=settings.num_train_epochs, delta=DELTA, members=len(sweep.members), rows=PLAIN_ROWS,
        passes=plain.num_train_epochs, error=rows[0].by_loss.error, precision=PRECISION,
        batch=settings.per_device_train_batch_size * settings.gradient_accumulation_steps,
    )  # fmt: skip
    return "\n\n".join([prose, table(headings, [row.cells() for row in rows]), _plot(rows)])


def _plot(rows: list[Row]) -> str:
    trained = [row for row in rows if row.name != UNTRAINED and "encrypted" not in row.name]
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
