"""Measure the gradients of a real pretrained model against plaintext: by method, by share of two-byte weights, encrypted.

`benchmarks.training.real_model` says which model. Each row is stored under
build/precision_real/ as it is measured, and a run that was interrupted goes on there. A row of other batches or of another
adapter, which its losses in plaintext tell, is measured again.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor

from benchmarks.report import ROOT, new_figure, save_plot, table
from benchmarks.training.builds import scratch_folder
from benchmarks.training.real_model import BATCH_SIZE, BUCKET, Batch, Gradients, RealModel
from benchmarks.training.rounded_plan import MeasuredPlan, calibrated, split_plan
from hecompile.bundles.client import ClientBundle
from hecompile.bundles.kinds import CLIENT, WORKER
from hecompile.bundles.worker import WorkerBundle
from hecompile.compiler.calibration import SHORT_LENGTH, write_samples
from hecompile.compiler.frontend import export_onnx, load_checkpoint
from hecompile.compiler.linear import CompileOptions, compile_checkpoint
from hecompile.compiler.options import WeightBits
from hecompile.compiler.polynomial_options import PolynomialOptions
from hecompile.files import write_whole
from hecompile.he.random.sampling import PublicSeed
from hecompile.plan.circuits import SplitPlan
from hecompile.runtime.client.encrypted_model import EncryptedCausalLM
from hecompile.runtime.client.products import EncryptedProducts
from hecompile.runtime.transports import InProcessTransport
from hecompile.runtime.worker.worker import Worker

SEED = PublicSeed.from_hex("11" * 32)
BUDGETS = (1.6e-2, 8e-3, 2e-3, 2e-4, CompileOptions().error_budget)
METHODS = [(name, bits) for bits in (8, 12) for name in ("nearest", "rotated", "feedback", "rotated, feedback")]
ENCRYPTED: tuple[WeightBits, ...] = ("auto", 8)
COSINE, LENGTH = 0.999, 0.01
_SAME_LOSS = 1e-4
"""Sums in another order, as of another number of threads, move a loss by less, relative to it."""

PROSE = """\
## Gradients of a real model

{folder}: one batch of {chat} tokens of chat, whose answers carry the loss, and one of {prose} tokens of prose, all of
which does. The adapter was trained for some steps in plaintext. *Cosine*: of the gradient of each of the {matrices} LoRA
matrices to float32 plaintext PEFT. *Length*: largest relative difference of its length. *Below* and *over*: matrices with a
cosine under {cosine} and a length more than {length:.0%} off.
"""
METHOD_PROSE = """\
### By method, without encryption

*nearest*: rounding to nearest. *rotated*: of rotated inputs. *feedback*: GPTQ on what the model wrote itself.
"""
FRONTIER_PROSE = """\
### By share of the weights in two bytes, without encryption

Both methods; bits chosen by `--weight-bits auto` for several error budgets ({budget:g} is the default), 12 where it is two
bytes. *Worker*: seconds of a training step of these {chat} tokens, predicted by the cost model.
"""
ENCRYPTED_PROSE = """\
### Encrypted

The same batches over a worker in this process, compiled by `hecompile export llama` with these weight bits.
"""


@dataclass(frozen=True)
class Row:
    """Hold what one plan gives on one batch."""

    share: float
    bytes_per_token: int
    worker: float
    loss: float
    exact_loss: float
    smallest: float
    median: float
    below: int
    length: float
    over: int

    def cells(self) -> list[object]:
        """Return loss and gradients for a table."""
        return [
            f"{self.loss - self.exact_loss:+.4f} of {self.exact_loss:.3f}", f"{self.smallest:.5f}", f"{self.median:.6f}",
            self.below, f"{100 * self.length:.2f} %", self.over,
        ]  # fmt: skip


HEADINGS = ["batch", "loss difference", "smallest cosine", "median", "below", "length", "over"]


def run(quick: bool) -> str:
    """Return Markdown: tables by method and by share of two-byte weights, a plot of it, a table of encrypted plans."""
    bench = Bench(RealModel(), METHODS[:1] if quick else METHODS, BUDGETS[-1:] if quick else BUDGETS)
    methods = [
        [name, bits, batch, *row.cells()]
        for name, bits in bench.methods
        for batch, row in bench.rows(f"{name}-{bits}", bench.method(name, bits)).items()
    ]
    frontier = {key: bench.rows(key, make) for key, make in bench.frontier()}
    encrypted = [
        [bits, f"{rows['chat'].share:.0%}", rows["chat"].bytes_per_token, batch, *row.cells()]
        for bits in (() if quick else ENCRYPTED)
        for rows in [bench.encrypted(bits)]
        for batch, row in rows.items()
    ]
    budget = CompileOptions().error_budget
    tokens = {name: int(batch["attention_mask"].sum()) for name, batch in bench.batches.items()}
    parts = [
        PROSE.format(folder=bench.real.folder.name, matrices=bench.matrices, cosine=COSINE, length=LENGTH, **tokens),
        METHOD_PROSE,
        table(["method", "bits", *HEADINGS], methods),
        FRONTIER_PROSE.format(budget=budget, **tokens),
        table(["two bytes", "bytes/token", "worker", *HEADINGS], _frontier_rows(frontier)),
        _plot(frontier),
        ENCRYPTED_PROSE,
        table(["weight bits", "two bytes", "bytes/token", *HEADINGS], encrypted),
    ]
    return "\n\n".join(parts)


def _frontier_rows(frontier: dict[str, dict[str, Row]]) -> list[list[object]]:
    return [
        [f"{row.share:.0%}", row.bytes_per_token, row.worker, batch, *row.cells()]
        for rows in frontier.values()
        for batch, row in rows.items()
    ]


def _plot(frontier: dict[str, dict[str, Row]]) -> str:
    figure, axes = new_figure("gradients against two-byte weights", "share of weights in two bytes", "1 - cosine")
    for batch in ("chat", "prose"):
        rows = sorted((rows[batch] for rows in frontier.values()), key=lambda row: row.share)
        shares = [row.share for row in rows]
        axes.plot(shares, [1 - row.smallest for row in rows], marker="o", label=f"worst, {batch}")
        axes.plot(shares, [1 - row.median for row in rows], marker="s", label=f"median, {batch}")
    axes.axhline(1 - COSINE, color="grey", linewidth=0.8)
    axes.set_yscale("log")
    axes.legend(fontsize=7)
    return save_plot(figure, "precision_real", "1 - cosine of the gradients by share of the weights in two bytes")


class Bench:
    """Hold the model's export, its batches and exact gradients; measure plans and remember what was measured."""

    def __init__(self, real: RealModel, methods: list[tuple[str, int]], budgets: tuple[float, ...]) -> None:
        self.real, self.methods, self._budgets = real, methods, budgets
        self._store = ROOT / "build" / "precision_real"
        self._store.mkdir(parents=True, exist_ok=True)
        self.batches = {"chat": real.chat_batch(), "prose": real.prose_batch()}
        plain = real.plaintext()
        self.adapter = real.trained_adapter(plain)
        self.exact = {name: Gradients.of(plain, batch) for name, batch in self.batches.items()}
        self.matrices = len(self.adapter)
        self._bases: dict[tuple[bool, bool], ir.Model] = {}
        self._exported: tuple[ir.Model, tuple[tuple[int, ...], ...]] | None = None

    def method(self, name: str, bits: int) -> Callable[[], SplitPlan]:
        """Return how a plan of a method is made, every weight of `bits` bits."""
        return lambda: split_plan(self._base("rotated" in name, "feedback" in name), bits)

    def frontier(self) -> list[tuple[str, Callable[[], SplitPlan]]]:
        """Return how plans are made from all one-byte weights to all two-byte weights, with the keys of their rows."""

        def by_budget(budget: float) -> Callable[[], SplitPlan]:
            return lambda: split_plan(self._base(True, True), "auto", budget)

        between = [(f"budget-{budget:g}", by_budget(budget)) for budget in self._budgets]
        name = "rotated, feedback"
        return [(f"{name}-8", self.method(name, 8)), *between, (f"{name}-12", self.method(name, 12))]

    def rows(self, key: str, make: Callable[[], SplitPlan]) -> dict[str, Row]:
        """Return the row of each batch, measured without encryption."""
        return self._remembered(key, lambda: MeasuredPlan.rounded(make()))

    def encrypted(self, bits: WeightBits) -> dict[str, Row]:
        """Return the row of each batch, measured over a worker in this process."""
        key = f"encrypted-{bits}"
        if (kept := self._kept(key)) is not None:
            return kept
        with scratch_folder() as scratch:
            options = CompileOptions(
                weight_bits=bits, batch_size=BATCH_SIZE, sequence_buckets=(BUCKET,), public_seed=SEED
            )
            compile_checkpoint(str(self.real.folder), scratch / "build", options)
            bundle = ClientBundle.open(scratch / "build" / CLIENT)
            worker = Worker(WorkerBundle.open(scratch / "build" / WORKER))
            model = EncryptedCausalLM(bundle, EncryptedProducts(bundle, InProcessTransport(worker.exchange)))
            return self._remembered(key, lambda: MeasuredPlan.encrypted(model))

    def _remembered(self, key: str, make: Callable[[], MeasuredPlan]) -> dict[str, Row]:
        if (kept := self._kept(key)) is not None:
            return kept
        print(f"precision_real: {key}", file=sys.stderr, flush=True)
        plan = make()
        plan.model.load_adapter_state(self.adapter)
        rows = {name: self._row(plan, name, batch) for name, batch in self.batches.items()}
        write_whole(self._file(key), json.dumps({name: asdict(row) for name, row in rows.items()}).encode())
        return rows

    def _kept(self, key: str) -> dict[str, Row] | None:
        return kept_rows(self._file(key), {name: exact.loss for name, exact in self.exact.items()})

    def _file(self, key: str) -> Path:
        return self._store / f"{key}.json"

    def _row(self, plan: MeasuredPlan, name: str, batch: Batch) -> Row:
        own, exact = Gradients.of(plan.model, batch), self.exact[name]
        cosines, lengths = own.cosines(exact), own.lengths(exact)
        tokens = int(batch["attention_mask"].sum())
        return Row(
            plan.two_byte_share, plan.bytes_per_token, tokens * plan.worker_seconds_per_token, own.loss, exact.loss,
            float(cosines.min()), float(cosines.median()), _count(cosines < COSINE), float(lengths.max()),
            _count(lengths > LENGTH),
        )  # fmt: skip

    def _base(self, rotated: bool, feedback: bool) -> ir.Model:
        if self._exported is None:
            checkpoint = load_checkpoint(str(self.real.folder))
            exported = export_onnx(checkpoint.model)
            self._exported = exported, write_samples(checkpoint, exported, PolynomialOptions(), SEED, SHORT_LENGTH)
        key = rotated, feedback
        if key not in self._bases:
            self._bases = {key: calibrated(*self._exported, *key)}  # one at a time: each holds all weights
        return self._bases[key].clone()


def _count(which: Tensor) -> int:
    return int(torch.count_nonzero(which))


def kept_rows(path: Path, exact: dict[str, float]) -> dict[str, Row] | None:
    """Return the rows in a file; None where there is none, or where they were measured at other losses than `exact`."""
    if not path.is_file():
        return None
    rows = {name: Row(**row) for name, row in json.loads(path.read_text(encoding="utf-8")).items()}
    same = rows.keys() == exact.keys() and all(
        math.isclose(row.exact_loss, exact[name], rel_tol=_SAME_LOSS) for name, row in rows.items()
    )
    return rows if same else None
