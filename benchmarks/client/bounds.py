"""Measure what calibrated bounds gain, how often a row is sent again in training, and what looking for wraps costs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from benchmarks.report import ROOT, section_main, table
from benchmarks.timing import paired, threads
from benchmarks.training.real_model import BUCKET, Batch, RealModel
from benchmarks.training.rounded_plan import RoundedModel, calibrated
from benchmarks.worker.linears import llama_layer, public_matrix, random_linear, random_rows, stored_hint
from hecompile.compiler.calibration import SHORT_LENGTH, write_samples
from hecompile.compiler.frontend import export_onnx, load_checkpoint
from hecompile.compiler.options import Bounds, CompileOptions
from hecompile.compiler.polynomial_options import PolynomialOptions
from hecompile.he.fused import decrypt_reals, encrypt_reals
from hecompile.he.parameters import LOG_Q, LinearParameters
from hecompile.he.random.sampling import PublicSeed, SecretRandom
from hecompile.he.scheme import evaluate
from hecompile.he.weight_norms import measure_norms
from hecompile.he.wraps import WrapChecks, boundary_share, largest_factor
from hecompile.inspection.linear import circuits_without_gradient, predicted_traffic
from hecompile.models import PRIVATE_TRAIN, TINY_LLAMA
from hecompile.passes.offload.annotate_secrecy import AnnotateSecrecy
from hecompile.passes.offload.place import Place
from hecompile.passes.offload.select_parameters import choose_ring
from hecompile.passes.offload.split import Split
from hecompile.passes.offload.stack_projections import StackProjections
from hecompile.plan.circuits import MARGIN, RemoteCircuit, SplitPlan, effective_bits
from hecompile.runtime.client.bounds import largest_products
from hecompile.runtime.model.data import PadToBucket, eos_and_pad, load_examples

SEED = PublicSeed.from_hex("11" * 32)
ROWS, LEARNING_RATE = 12, 2e-4
HALF = 2.0 ** (LOG_Q - 1)
SHAPES = [shape for there in llama_layer(2048).values() for shape in (there, there[::-1])]
PROSE = f"""\
## Calibrated bounds

Plans with 8-bit weights at 8 effective bits. *Gain*: bits by which tokens are scaled beyond the proven bound, by
calibration as export makes it, with a margin of {MARGIN:g}; the least, the median and the most over the layers. *Effective
bits*: median over the layers with the same words, under the proven bound and with the gain. *Rows*: of a training run, here
without encryption and with the plan's integers. *Repeated*: rows of which a product would wrap, so that they are sent
again. *Fullest*: the largest product in proportion to q/2. *Boundary*: how near to q/2, in proportion to it, a product is
whose wrap an error below verification's tolerance can decide.
"""
COST_PROSE = """\
### The client's second look

Encrypting and decrypting {tokens} tokens at the shapes of a layer of Llama-3.2-1B, one thread, beside `WrapChecks.wrapped`
and the largest product of each token; nanoseconds per element that goes up or comes down.
"""


def run(quick: bool) -> str:
    """Return Markdown: tables of the small and the real model, and one of times."""
    models = [small_model] if quick else [small_model, real_model]
    rows, totals = [], []
    for model in models:
        own_rows, total = _measured(*model(quick))
        rows += own_rows
        totals.append(total)
    headings = ["product", "gain", "effective bits", "rows", "repeated", "fullest", "boundary"]
    words = table(["model", "tokens", "steps", "rows", "repeated", "bytes/token proven", "calibrated"], totals)
    return "\n\n".join([PROSE, table(headings, rows), words, _costs(quick)])


def small_model(quick: bool) -> tuple[str, Path, list[Batch]]:
    """Return the shipped small Llama and its private training data, several epochs of it."""
    tokenizer = load_checkpoint(str(TINY_LLAMA)).tokenizer
    examples = load_examples(PRIVATE_TRAIN, tokenizer, (64,))
    collate = PadToBucket((64,), eos_and_pad(tokenizer)[1])
    starts = range(0, len(examples) - ROWS, ROWS)
    batches = [collate([examples[start + row] for row in range(ROWS)]) for start in starts]
    return "small", TINY_LLAMA, batches[:2] if quick else 6 * batches


def real_model(quick: bool) -> tuple[str, Path, list[Batch]]:
    """Return the real model, its chat data and all of this project's pages."""
    del quick
    real = RealModel()
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    ids = real.tokenizer(text, add_special_tokens=False)["input_ids"]
    rows = torch.tensor(ids[: len(ids) // BUCKET * BUCKET]).view(-1, BUCKET)  # [rows, S]
    pages = [
        {"input_ids": part, "labels": part, "attention_mask": torch.ones_like(part)} for part in rows.split(ROWS)
    ]
    chat = [real.batch_of(step, ROWS) for step in range(len(real.examples) // ROWS)]
    mixed = [batch for pair in zip(chat, pages, strict=False) for batch in pair]
    return real.folder.name, real.folder, mixed[:24]


@dataclass
class Seen:
    """Hold how many rows were multiplied, how many wrapped, and how far the largest product filled q/2."""

    rows: int = 0
    repeated: int = 0
    fullest: float = 0.0


class WatchedModel(RoundedModel):
    """Train on a plan's integers in float32 and note what its products would have filled of q/2."""

    def __init__(self, plan: SplitPlan) -> None:
        super().__init__(plan)
        self.circuits = {circuit.name: circuit for circuit in plan.circuits}
        self.seen: dict[str, Seen] = defaultdict(Seen)
        self.live = torch.ones(0, dtype=torch.bool)

    def product(self, linear: str, x: Tensor, scale: Tensor) -> Tensor:
        """See `RoundedModel.product`."""
        result: Tensor = _Product.apply(x, scale, self, linear)
        return result

    def multiply(self, circuit: str, x: Tensor) -> Tensor:
        """Return x times the integers of a circuit, [..., out], and note it."""
        product = x @ self._weights[circuit].float()
        linear, seen = self.circuits[circuit].parameters, self.seen[circuit]
        share = _share(linear, x.flatten(0, -2)[self.live], product.flatten(0, -2)[self.live])
        seen.rows += len(share)
        seen.repeated += int((share >= 1).sum())
        seen.fullest = max(seen.fullest, float(share.max(initial=0)) if len(share) else 0.0)
        return product


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, model: WatchedModel, linear: str) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.model, ctx.linear = model, linear
        return model.multiply(f"{linear}.forward", x) * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        wanted = ctx.needs_input_grad[0]
        return ctx.model.multiply(f"{ctx.linear}.backward", gradients[0] * scale) if wanted else None, None, None, None


def _share(linear: LinearParameters, x: Tensor, product: Tensor) -> Any:
    """Return max |W_i·x| over q/2 of each token, encoded for the circuit: float64 array [T]; 0 for rows of zeros."""
    rows = x.double()
    scale = rows.abs().amax(dim=1) / linear.input_bound
    scale = torch.minimum(scale, torch.linalg.vector_norm(rows, dim=1) / linear.norm_bound)
    largest = product.abs().amax(dim=1).double()
    return torch.where(scale > 0, largest / scale / HALF, 0.0).numpy()


def _plans(folder: Path) -> tuple[SplitPlan, SplitPlan]:
    """Lower a checkpoint to plans with calibrated and with proven bounds, of the same integers."""
    checkpoint = load_checkpoint(str(folder))
    exported = export_onnx(checkpoint.model)
    model = calibrated(exported, write_samples(checkpoint, exported, PolynomialOptions(), SEED, SHORT_LENGTH), True, True)
    for transform in (CompileOptions(weight_bits=8).quantize(), AnnotateSecrecy(), Place(), StackProjections()):
        model = transform(model).model

    def selected(bounds: Bounds) -> SplitPlan:
        own: ir.Model = CompileOptions(bounds=bounds).select_parameters()(model.clone()).model
        return Split()(own)

    return selected("calibrated"), selected("proven")


def _measured(name: str, folder: Path, batches: list[Batch]) -> tuple[list[list[object]], list[object]]:
    """Train on batches; return a row of cells per kind of product, and one of the whole run."""
    plan, proven = _plans(folder)
    model = WatchedModel(plan)
    _train(model, batches)
    kinds: dict[str, list[RemoteCircuit]] = defaultdict(list)
    for circuit in plan.circuits:
        kinds[".".join(circuit.name.split(".")[-2:])].append(circuit)
    rows = [_row(name, kind, circuits, model.seen) for kind, circuits in kinds.items()]
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    seen = list(model.seen.values())
    traffic = [_bytes(own) for own in (proven, plan)]
    return rows, [name, tokens, len(batches), sum(s.rows for s in seen), sum(s.repeated for s in seen), *traffic]


def _train(model: WatchedModel, batches: list[Batch]) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for key, matrix in model.adapter_state().items():
            if ".lora_A." in key:
                torch.nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
    optimizer = torch.optim.AdamW(model.adapter_state().values(), lr=LEARNING_RATE)
    for batch in batches:
        model.live = batch["attention_mask"].bool().flatten()
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


def _row(model: str, kind: str, circuits: list[RemoteCircuit], seen: dict[str, Seen]) -> list[object]:
    gains = sorted(math.log2(circuit.parameters.gain) for circuit in circuits)
    bits = [median(effective_bits(p, c.norms, c.crest) for c, p in pairs) for pairs in _both(circuits)]
    own = [seen[circuit.name] for circuit in circuits if circuit.name in seen]
    return [
        f"{model}, {kind}", f"{gains[0]:.1f}, {median(gains):.1f}, {gains[-1]:.1f}", f"{bits[0]:.1f} → {bits[1]:.1f}",
        sum(s.rows for s in own), sum(s.repeated for s in own), max((s.fullest for s in own), default=0.0),
        f"{max(boundary_share(circuit.parameters) for circuit in circuits):.2%}",
    ]  # fmt: skip


def _both(circuits: list[RemoteCircuit]) -> Iterator[list[tuple[RemoteCircuit, LinearParameters]]]:
    yield [(circuit, circuit.parameters.proven) for circuit in circuits]
    yield [(circuit, circuit.parameters) for circuit in circuits]


def _bytes(plan: SplitPlan) -> int:
    circuits = {circuit.name: circuit.parameters for circuit in plan.circuits}
    return predicted_traffic(circuits, circuits_without_gradient(plan.client)).total


def _costs(quick: bool) -> str:
    tokens, shapes, repeats = (40, [(64, 96)], 2) if quick else (512, SHAPES, 7)
    rows, sums = [], [0.0, 0.0, 0.0]
    for inputs, outputs in shapes:
        seconds = _seconds(inputs, outputs, tokens, repeats)
        sums = [total + part for total, part in zip(sums, seconds[:3], strict=True)]
        rows.append([f"{inputs} × {outputs}", seconds[3], *_cells(seconds[:3], tokens * (inputs + outputs))])
    elements = tokens * sum(inputs + outputs for inputs, outputs in shapes)
    rows.append(["layer", "", *_cells(sums, elements)])
    headings = ["in × out", "vectors", "encrypt and decrypt", "wrapped?", "largest", "cost"]
    return COST_PROSE.format(tokens=tokens) + "\n\n" + table(headings, rows)


def _cells(seconds: list[float], elements: int) -> list[object]:
    crypto, wrapped, largest = seconds
    cost = f"{(wrapped + largest) / crypto:+.1%}"
    return [1e9 * crypto / elements, 1e9 * wrapped / elements, 1e9 * largest / elements, cost]


def _seconds(inputs: int, outputs: int, tokens: int, repeats: int) -> list[Any]:
    """Return seconds of the cryptography of a product and of both parts of the second look, and its number of vectors."""
    linear = random_linear(inputs, outputs)
    parameters, public, x = linear.parameters, public_matrix(choose_ring(tokens), inputs), random_rows(tokens, inputs)
    largest = largest_factor(parameters, measure_norms(linear.weight)[0])
    assert largest is not None
    checks = WrapChecks.draw(linear.weight, largest, SecretRandom())
    rows = torch.rand(outputs) + 0.5
    with stored_hint(public, linear) as hint, threads(1):
        ciphertext, key = encrypt_reals(public, x, parameters)
        reply = evaluate(linear.weight, ciphertext.planes, parameters)
        product = decrypt_reals(key, hint, reply, parameters, rows)
        samples = paired(
            {
                "encrypt": partial(encrypt_reals, public, x, parameters),
                "decrypt": partial(decrypt_reals, key, hint, reply, parameters, rows),
                "wrapped": partial(checks.wrapped, x, product, torch.from_numpy(key.scale), None, rows),
                "largest": partial(largest_products, product, rows),
            },
            repeats,
        )
    seconds = {name: own.seconds for name, own in samples.items()}
    return [seconds["encrypt"] + seconds["decrypt"], seconds["wrapped"], seconds["largest"], checks.count]


if __name__ == "__main__":
    section_main("bounds")
