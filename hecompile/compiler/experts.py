"""Write a mixture of experts so that the exporter sees each expert as linears of its own.

transformers keeps the experts of a block in two tensors and multiplies by those that a batch asks for, which no exporter
follows. Here every expert is a pair of linears over all tokens, and what the router did not choose is multiplied by 0
(Shazeer et al., arXiv 1701.06538; Mixtral, arXiv 2401.04088). `RouteExperts` leaves out what need not be computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Expert(torch.nn.Module):
    def __init__(self, gate_up: Tensor, down: Tensor, activation: Any) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self._activation = _linear(gate_up), _linear(down), activation

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)  # [B, S, F] each
        result: Tensor = self.down_proj(self._activation(gate) * up)  # [B, S, H]
        return result


class _Mixture(torch.nn.Module):
    """Compute what a block of transformers with `gate` and `experts` computes; weights are shared with it."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.gate = block.gate
        experts = block.experts
        pairs = zip(experts.gate_up_proj, experts.down_proj, strict=True)
        self.experts = torch.nn.ModuleList(_Expert(gate_up, down, experts.act_fn) for gate_up, down in pairs)

    def forward(self, x: Tensor) -> Tensor:
        chances = torch.softmax(F.linear(x, self.gate.weight), dim=-1)  # [B, S, experts]
        chosen, indices = torch.topk(chances, self.gate.top_k, dim=-1)  # [B, S, k]
        if getattr(self.gate, "norm_topk_prob", True):  # Mixtral has no such setting, and divides
            chosen = chosen / chosen.sum(dim=-1, keepdim=True)
        weights = (chances * 0).scatter(-1, indices, chosen)  # [B, S, experts]
        results = [
            expert(x) * weight
            for expert, weight in zip(self.experts, weights.split(1, dim=-1), strict=True)  # [B, S, H]
        ]
        return _sum(results)


@contextmanager
def experts_apart(model: torch.nn.Module) -> Iterator[None]:
    """Put `_Mixture` in the place of every mixture of experts in `model` while it is exported."""
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if getattr(getattr(child, "experts", None), "gate_up_proj", None) is not None
    ]
    for parent, name, block in found:
        setattr(parent, name, _Mixture(block).eval())
    try:
        yield
    finally:
        for parent, name, block in found:
            setattr(parent, name, block)


def _linear(weight: Tensor) -> torch.nn.Linear:
    """Return a linear without bias on the memory of `weight` [out, in]."""
    with torch.device("meta"):
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = torch.nn.Parameter(weight.detach(), requires_grad=False)
    return linear


def _sum(results: list[Tensor]) -> Tensor:
    total = results[0]
    for result in results[1:]:
        total = total + result
    return total
