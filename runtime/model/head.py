"""Compute the output head and its cross entropy at the scored positions alone.

A vocabulary of 128256 makes a position cost as much in the head as in four layers of a 1B model, and 0.5 MB for its logits.
So positions that no label scores are left out before the head, and the loss goes through it in pieces of rows, whose
gradient with respect to the hidden states is taken at once (the head is frozen), so that one piece of logits is all that
ever exists. (The idea is that of Liger Kernel's fused linear cross entropy, Hsu et al., arXiv 2410.10989.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hecompile.runtime.model.data import IGNORED

Release = Callable[[slice], None]
"""Called with rows of the weight that have been used: where they lie in a mapped file they may leave memory."""

WEIGHT_ROWS = 1 << 14
"""Rows of the weight at work at a time, 134 MB of a hidden size of 2048; of a mapped weight no more need be in memory."""

PIECE_BYTES = 128 << 20
"""Size of one piece of logits, float32: 261 rows of 128256. Half of it takes a third longer per row, for each piece reads
the whole weight twice."""


def scored_positions(labels: Tensor) -> Tensor:
    """Mark the positions i whose logits the label at i + 1 scores: bool [B, S] of int64 labels [B, S]."""
    scored = torch.zeros_like(labels, dtype=torch.bool)
    scored[:, :-1] = labels[:, 1:] != IGNORED
    return scored


def scored_targets(labels: Tensor) -> Tensor:
    """Return the next tokens at `scored_positions(labels)`, row by row: int64 [N]."""
    targets = labels[:, 1:].flatten()
    return targets[targets != IGNORED]


@dataclass(frozen=True)
class LogitsForm:
    """Say what becomes of the products x of hidden states and head: factor·x, or cap·tanh(factor·x) where there is a cap.

    Granite divides by `logits_scaling`; Gemma 2 caps (arXiv 2408.00118).
    """

    factor: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitsForm:
        """Read the form off a configuration of transformers."""
        cap = getattr(config, "final_logit_softcapping", None)
        return cls(1.0 / getattr(config, "logits_scaling", 1.0) if cap is None else 1.0 / cap, cap)

    def __call__(self, product: Tensor) -> Tensor:
        """Return the logits of products [..., V]."""
        scaled = product if self.factor == 1.0 else product * self.factor
        return scaled if self.cap is None else torch.tanh(scaled) * self.cap

    def slope(self, logits: Tensor) -> Tensor | float:
        """Return the derivative of logits by the products that they were made of: a tensor, or one number for all."""
        return self.factor if self.cap is None else (1 - (logits / self.cap) ** 2) * (self.factor * self.cap)


_AS_THEY_ARE = LogitsForm()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, release: Release, form: LogitsForm
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(hidden) if wanted else None  # [N, H]
        total = hidden.new_zeros(())
        vocabulary = [slice(at, min(at + WEIGHT_ROWS, len(weight))) for at in range(0, len(weight), WEIGHT_ROWS)]
        most = max(1, PIECE_BYTES // (weight.shape[0] * weight.element_size()))
        rows = math.ceil(len(hidden) / max(1, math.ceil(len(hidden) / most))) or 1  # pieces of about one size
        for start in range(0, len(hidden), rows):
            piece = slice(start, start + rows)
            logits = hidden.new_empty(len(hidden[piece]), len(weight))  # [n, V]
            for words in vocabulary:
                torch.mm(hidden[piece], weight[words].t(), out=logits[:, words])
                release(words)
            logits = form(logits)
            slope = form.slope(logits) if wanted else 1.0
            target = targets[piece, None]  # [n, 1]
            logits -= logits.amax(dim=1, keepdim=True)
            at_target = logits.gather(1, target)  # [n, 1]
            exponentials = logits.exp_()  # in place: one piece of logits exists at a time
            sums = exponentials.sum(dim=1, keepdim=True)  # [n, 1]
            total += (sums.log() - at_target).sum()
            if gradient is not None:
                # d/dlogits of -log softmax at the target is softmax minus its indicator.
                probabilities = exponentials.div_(sums)
                probabilities.scatter_add_(1, target, torch.full_like(sums, -1.0))
                if form != _AS_THEY_ARE:
                    probabilities *= slope
                for words in reversed(vocabulary):
                    gradient[piece].addmm_(probabilities[:, words], weight[words])
                    release(words)
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, None, None, None, None]:
        gradient, ctx.gradient = ctx.gradient, None
        return None if gradient is None else gradient * gradients[0], None, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    release: Release = lambda rows: None,
    form: LogitsForm = _AS_THEY_ARE,
) -> Tensor:
    """Return Σ over rows of -log softmax(form(hidden·weightᵀ))[target] in nats: float32 scalar, differentiable once, in
    `hidden`.

    hidden f32 [N, H], weight f32 [V, H] without gradient, targets int64 [N]; `release` is called with the rows of the
    weight that have been used.
    """
    total: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, release, form)
    return total
