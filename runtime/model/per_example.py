"""Take the gradients of LoRA's matrices per example, from one backward pass over the batch.

For y = x·Wᵀ the gradient of W is dyᵀ·x, summed over the rows; summed over the rows of one example alone it is that example's
(Goodfellow, arXiv 1510.01799; Opacus' rule for linear layers). Nothing but the input and the gradient of each LoRA
product is needed, and both are on the client: to the worker the pass is like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from hecompile.errors import InputError
from hecompile.runtime.model.adapter import AdapterModel


@dataclass(frozen=True)
class PerExample:
    """Hold the loss and gradients of a batch of B examples.

    loss: the cross entropy in nats summed over all their labels, a detached scalar.
    tokens: how many labels each has, int64 [B].
    gradients: per matrix the gradient of each example's own sum, float32 [B, *shape].
    """

    loss: Tensor
    tokens: Tensor
    gradients: dict[str, Tensor]

    def of_means(self) -> dict[str, Tensor]:
        """Return the gradients of each example's mean over its own labels; zeros for one without labels."""
        counts = self.tokens.clamp(min=1)
        return {name: value / counts.view(-1, *[1] * (value.dim() - 1)) for name, value in self.gradients.items()}


@runtime_checkable
class PerExampleModel(Protocol):
    """Mark an `AdapterModel` that can tell apart what each example does to its adapter."""

    def per_example_gradients(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> PerExample:
        """Compute loss and gradients of a batch (int64 [B, S] each, as `AdapterModel.__call__` takes it).

        It is one pass forward and one backward; no parameter's `grad` is touched. `generator` draws LoRA's dropout.
        """


def require_per_example(model: AdapterModel) -> PerExampleModel:
    """Return `model`; raise InputError where it has no gradients per example."""
    if not isinstance(model, PerExampleModel):
        raise InputError(
            f"{type(model).__name__} has no gradients per example, which privacy needs; use mode: paper without"
        )
    return cast("PerExampleModel", model)


class GradientCollector:
    """Multiply by trainable matrices in a forward pass, and take their gradients apart by example in the backward pass.

    Args:
        parameters: the trainable matrices by name; `product` knows them by identity.
        segmentations: how rows may belong to examples: each gives the rows of every example of the batch, in order. A
            product goes by the one that has as many rows in all.
    """

    def __init__(self, parameters: Mapping[str, Tensor], segmentations: Sequence[Sequence[int]]) -> None:
        self._parameters = list(parameters.values())
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._segments: dict[int, list[slice]] = {}
        for counts in segmentations:
            ends = list(accumulate(counts))
            self._segments[ends[-1]] = [slice(end - n, end) for end, n in zip(ends, counts, strict=True)]
        examples = len(segmentations[0])
        self._gradients = {name: value.new_zeros(examples, *value.shape) for name, value in parameters.items()}

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Compute x·weightᵀ: x [..., in], weight [out, in], one of the parameters."""
        result: Tensor = _Product.apply(x, weight, self._names[id(weight)], self._add)
        return result

    def _add(self, name: str, x: Tensor, gradient: Tensor) -> None:
        rows, inputs = gradient.flatten(0, -2), x.flatten(0, -2)  # [R, out], [R, in]
        for example, rows_of in enumerate(self._segments[len(rows)]):
            self._gradients[name][example].addmm_(rows[rows_of].t(), inputs[rows_of])

    def backward(self, loss: Tensor, tokens: Tensor) -> PerExample:
        """Differentiate `loss`, the sum over all labels, of which the examples have `tokens` (int64 [B])."""
        torch.autograd.grad(loss, self._parameters, allow_unused=True)
        return PerExample(loss.detach(), tokens, {name: value.detach() for name, value in self._gradients.items()})


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, name: str, add: Callable[[str, Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.name, ctx.add = name, add
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        ctx.add(ctx.name, x, gradients[0])
        return gradients[0] @ weight if ctx.needs_input_grad[0] else None, None, None, None
