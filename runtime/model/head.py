"""Compute the output head and its cross entropy at the scored positions alone.

A vocabulary of 128256 makes a position cost as much in the head as in four layers of a 1B model, and 0.5 MB for its logits.
So positions that no label scores are left out before the head, and the loss goes through it in pieces of rows, whose
gradient with respect to the hidden states is taken at once (the head is frozen), so that one piece of logits is all that
ever exists. (The idea is that of Liger Kernel's fused linear cross entropy, Hsu et al., arXiv 2410.10989.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

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

CACHED_BYTES = 4 << 20
"""Bytes of logits that softmax and its gradient are computed of at a time: a tenth of what a third-level cache holds."""


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


class OutputHead(Protocol):
    """Multiply hidden states by a frozen weight W [V, H], whose rows lie in pieces one after the other."""

    @property
    def rows(self) -> int:
        """Return the most rows of logits that are to exist at a time."""

    def products(self, hidden: Tensor) -> list[Tensor]:
        """Return hidden·Wᵀ of f32 [n, H] in pieces f32 [n, V_k] of the vocabulary; the caller may write to them."""

    def gradient(self, pieces: list[Tensor]) -> Tensor:
        """Return the sum over the pieces of g·W_k for g f32 [n, V_k], f32 [n, H]; the list is emptied."""


class LocalHead:
    """Multiply by a weight [V, H] of this process, WEIGHT_ROWS rows at a time: one of 16 bits is converted to `dtype`.

    release: called with the rows of the weight that have been used. dtype: of the products, float32 or bfloat16, whose
    results are rounded to bfloat16; sums over the vocabulary, softmax and its gradient are float32 either way.
    """

    def __init__(
        self, weight: Tensor, release: Release = lambda rows: None, dtype: torch.dtype = torch.float32
    ) -> None:
        self._weight, self._release, self._dtype = weight, release, dtype
        self._vocabulary = [
            slice(at, min(at + WEIGHT_ROWS, len(weight))) for at in range(0, len(weight), WEIGHT_ROWS)
        ]

    @property
    def rows(self) -> int:
        return max(1, PIECE_BYTES // (4 * len(self._weight)))

    def products(self, hidden: Tensor) -> list[Tensor]:
        """See `OutputHead.products`."""
        logits = hidden.new_empty(len(hidden), len(self._weight))  # [n, V]
        rounded = hidden.to(self._dtype)
        for words, weight in self._converted(self._vocabulary):
            if self._dtype == logits.dtype:
                torch.mm(rounded, weight.t(), out=logits[:, words])
            else:
                logits[:, words] = rounded @ weight.t()
            self._release(words)
        return [logits]

    def gradient(self, pieces: list[Tensor]) -> Tensor:
        """See `OutputHead.gradient`."""
        gradient = pieces[0].new_zeros(len(pieces[0]), self._weight.shape[1])  # [n, H]
        for words, weight in self._converted(self._vocabulary[::-1]):
            if self._dtype == gradient.dtype:
                gradient.addmm_(pieces[0][:, words], weight)
            else:
                gradient += pieces[0][:, words].to(self._dtype) @ weight
            self._release(words)
        pieces.clear()
        return gradient


    def _converted(self, vocabulary: list[slice]) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows of the weight in the type of the products; what was converted is valid until the next."""
        if self._weight.dtype == self._dtype:
            yield from ((words, self._weight[words]) for words in vocabulary)
            return
        most = min(WEIGHT_ROWS, len(self._weight))
        piece = torch.empty(most, self._weight.shape[1], dtype=self._dtype)
        for words in vocabulary:
            yield words, piece[: words.stop - words.start].copy_(self._weight[words])


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: OutputHead, targets: Tensor, form: LogitsForm) -> Tensor:
        gradient = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None  # [N, H]
        total = hidden.new_zeros(())
        count = math.ceil(len(hidden) / max(1, math.ceil(len(hidden) / head.rows))) or 1  # pieces of about one size
        for start in range(0, len(hidden), count):
            piece = slice(start, start + count)
            logits = head.products(hidden[piece])  # one piece of logits exists at a time
            total += _to_gradient(logits, targets[piece], form, gradient is not None)
            if gradient is not None:
                gradient[piece] = head.gradient(logits)
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, None, None, None]:
        gradient, ctx.gradient = ctx.gradient, None
        return None if gradient is None else gradient * gradients[0], None, None, None


def _to_gradient(products: list[Tensor], targets: Tensor, form: LogitsForm, wanted: bool) -> Tensor:
    """Return the sum of the rows' cross entropies; where it is `wanted`, put its gradient in the place of the products.

    A few rows at a time, so that all that is done to them is done while a cache holds them.
    """
    total = products[0].new_zeros(())
    few = max(1, CACHED_BYTES // sum(piece.shape[1] * piece.element_size() for piece in products))
    for start in range(0, len(targets), few):
        rows = slice(start, start + few)
        total += _rows_to_gradient([piece[rows] for piece in products], targets[rows], form, wanted)
    return total


def _rows_to_gradient(rows: list[Tensor], targets: Tensor, form: LogitsForm, wanted: bool) -> Tensor:
    """See `_to_gradient`; each of `rows` f32 [n, V_k] is overwritten."""
    slopes: list[Tensor | float] = []
    if form != _AS_THEY_ARE:
        for piece in rows:
            piece.copy_(form(piece))
            slopes.append(form.slope(piece) if wanted else 1.0)
    peak = torch.stack([piece.amax(dim=1) for piece in rows]).amax(dim=0)[:, None]  # [n, 1]
    at_target, sums = torch.zeros_like(peak), torch.zeros_like(peak)
    places, first = [], 0
    for piece in rows:
        here = ((targets >= first) & (targets < first + piece.shape[1])).nonzero().squeeze(1)  # rows whose target is here
        places.append((here, targets[here] - first))
        piece -= peak
        at_target[here, 0] = piece[places[-1]]
        sums += piece.exp_().sum(dim=1, keepdim=True)
        first += piece.shape[1]
    if wanted:
        for piece, place in zip(rows, places, strict=True):
            # d/dlogits of -log softmax at the target is softmax minus its indicator.
            piece /= sums
            piece[place] -= 1.0
        for piece, slope in zip(rows, slopes, strict=False):
            piece *= slope
    return (sums.log() - at_target).sum()


class _HeadProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: OutputHead) -> Tensor:
        pieces = head.products(hidden)
        ctx.head, ctx.sizes = head, [piece.shape[1] for piece in pieces]
        return torch.cat(pieces, dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        return ctx.head.gradient([piece.contiguous() for piece in gradients[0].split(ctx.sizes, dim=1)]), None


def logits_of(hidden: Tensor, head: OutputHead, form: LogitsForm = _AS_THEY_ARE) -> Tensor:
    """Return form(hidden·Wᵀ) of f32 [N, H], f32 [N, V]; differentiable in `hidden`."""
    products: Tensor = _HeadProducts.apply(hidden, head)
    return form(products)


def head_cross_entropy(hidden: Tensor, head: OutputHead, targets: Tensor, form: LogitsForm = _AS_THEY_ARE) -> Tensor:
    """Return Σ over rows of -log softmax(form(hidden·Wᵀ))[target] in nats: float32 scalar, differentiable once, in `hidden`.

    hidden f32 [N, H], W the weight of `head`, targets int64 [N].
    """
    total: Tensor = _HeadCrossEntropy.apply(hidden, head, targets, form)
    return total


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    release: Release = lambda rows: None,
    form: LogitsForm = _AS_THEY_ARE,
) -> Tensor:
    """Compute `head_cross_entropy` for the weight f32 [V, H], without gradient; `release` as of `LocalHead`."""
    return head_cross_entropy(hidden, LocalHead(weight, release), targets, form)
