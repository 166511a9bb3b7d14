"""Define the operators that compute on integers of few bits.

* `QuantizedSiLU(x; bits, lower, input_scale, output_scale, zero, entries, domain_lower, domain_upper, error_bound)`: SiLU by
  a table of 2^bits integers (`hecompile.approximation.silu_table`). Its gradient is that of SiLU where the input is not
  clamped at the upper end, and zero there (straight-through, Bengio et al., arXiv 1308.3432).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hecompile.graph.ir import DOMAIN
from hecompile.graph.operators import Attributes, Context, operator


def table_indices(x: Tensor, attributes: Attributes) -> Tensor:
    """Return the index of each value's entry in the table, int64 of the shape of x."""
    steps = torch.round((x - attributes["lower"]) / attributes["input_scale"])
    return steps.clamp(0, (1 << attributes["bits"]) - 1).to(torch.int64)


def table_values(integers: Tensor, attributes: Attributes, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the numbers that entries of the table stand for."""
    return (integers - attributes["zero"]).to(dtype) * attributes["output_scale"]


class _QuantizedSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, attributes: Attributes) -> Tensor:
        ctx.save_for_backward(x)
        ctx.upper = attributes["domain_upper"]
        entries = torch.tensor(attributes["entries"], dtype=torch.int64, device=x.device)
        return table_values(entries[table_indices(x, attributes)], attributes, x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        slope: Tensor = torch.ops.aten.silu_backward(gradients[0], x)
        return torch.where(x <= ctx.upper, slope, 0.0), None


@operator("QuantizedSiLU", DOMAIN)
def _quantized_silu(context: Context, attributes: Attributes, x: Tensor) -> Tensor:
    result: Tensor = _QuantizedSiLU.apply(x, attributes)
    return result
