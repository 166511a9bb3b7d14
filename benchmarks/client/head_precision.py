"""Measure what a quantised or bfloat16 output head does to loss and gradients of a real model, and what a local one takes.

The products are in the clear: encryption adds noise of its effective bits to each, as to any other linear's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.report import table
from benchmarks.timing import paired
from benchmarks.training.real_model import RealModel
from hecompile.graph.rotation import rotate
from hecompile.passes.offload.quantize import quantize_weight
from hecompile.runtime.model.head import (
    LocalHead,
    OutputHead,
    head_cross_entropy,
    scored_positions,
    scored_targets,
)

BITS = (8, 10, 12)
WIDE, HIDDEN, ROWS = 128256, 2048, 128
PROSE = """\
## The output head

{folder}: {tokens} positions of prose, all scored. *Loss*: relative difference to the float32 head. *Cosine*: of the
gradient of the hidden states, over all and of the worst position. Remote: weights of the rotated head rounded to nearest,
products in the clear. Local in bfloat16: `head_products: bfloat16` in a recipe.
"""
SPEED = """\
CPU seconds (all threads) of a local head of Llama-3.2-1B's shape, {vocabulary} x {hidden}, loss and gradient, for {rows}
scored positions:
"""


@dataclass(frozen=True)
class _Rotated:
    """Multiply rotated hidden states by a rotated weight [V, H]; its gradient is turned back."""

    weight: Tensor
    rows: int = 1 << 20

    def products(self, hidden: Tensor) -> list[Tensor]:
        return [rotate(hidden) @ self.weight.t()]

    def gradient(self, pieces: list[Tensor]) -> Tensor:
        rotated = pieces.pop() @ self.weight  # [n, H], of rotate(x), which is linear
        x = torch.zeros_like(rotated, requires_grad=True)
        with torch.enable_grad():
            return torch.autograd.grad(rotate(x), x, rotated)[0]


def run(quick: bool) -> str:
    """Return Markdown: a table of precision, and one of CPU seconds."""
    model = RealModel()
    base = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32)
    batch = model.prose_batch()
    if quick:
        batch = {name: value[:1] for name, value in batch.items()}
    with torch.no_grad():
        states = base.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        hidden = states[scored_positions(batch["labels"])]  # [N, H]
    targets, weight = scored_targets(batch["labels"]), base.lm_head.weight.detach()
    exact = _loss_and_gradient(LocalHead(weight), hidden, targets)
    heads: dict[str, OutputHead] = {f"remote, {bits} bits": _Rotated(_rounded(weight, bits)) for bits in BITS}
    heads["local in bfloat16"] = LocalHead(weight, dtype=torch.bfloat16)
    rows: list[list[object]] = []
    for name, head in heads.items():
        loss, gradient = _loss_and_gradient(head, hidden, targets)
        each = F.cosine_similarity(gradient.double(), exact[1].double(), dim=1)
        whole = F.cosine_similarity(gradient.double().flatten(), exact[1].double().flatten(), dim=0)
        rows.append([name, f"{100 * (loss / exact[0] - 1):+.4f} %", f"{float(whole):.5f}", f"{float(each.min()):.4f}"])
    prose = PROSE.format(folder=model.folder.name, tokens=len(targets))
    precision = table(["head", "loss", "cosine", "worst position"], rows)
    return "\n\n".join([prose, precision, _speed(quick)])


def _rounded(weight: Tensor, bits: int) -> Tensor:
    integers, scale = quantize_weight(rotate(weight).numpy(), bits)
    return torch.from_numpy(integers).float() * torch.from_numpy(scale)[:, None]


def _loss_and_gradient(head: OutputHead, hidden: Tensor, targets: Tensor) -> tuple[float, Tensor]:
    x = hidden.clone().requires_grad_()
    loss = head_cross_entropy(x, head, targets)
    loss.backward()
    assert x.grad is not None
    return loss.item(), x.grad


def _speed(quick: bool) -> str:
    vocabulary = WIDE // 64 if quick else WIDE
    weight = torch.randn(vocabulary, HIDDEN).mul_(0.02).to(torch.bfloat16)
    hidden, targets = torch.randn(ROWS, HIDDEN), torch.randint(vocabulary, (ROWS,))
    heads = {
        "float32": LocalHead(weight.float()),
        "float32, weight stored in bfloat16": LocalHead(weight),
        "bfloat16": LocalHead(weight, dtype=torch.bfloat16),
    }
    calls = {name: lambda head=head: _loss_and_gradient(head, hidden, targets) for name, head in heads.items()}
    samples = paired(calls, 1 if quick else 3)
    reference = samples["float32"].cpu_seconds
    rows = [[name, each.cpu_seconds, each.cpu_seconds / reference] for name, each in samples.items()]
    heading = SPEED.format(vocabulary=vocabulary, hidden=HIDDEN, rows=ROWS)
    return f"{heading}\n\n" + table(["products", "CPU seconds", "over float32"], rows)
