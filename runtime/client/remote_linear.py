"""Make a remote product a step of torch's autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hecompile.errors import InputError
from hecompile.runtime.client.products import Products


def remote_linear(x: Tensor, scale: Tensor, products: Products, linear: str) -> Tensor:
    """Return (x·Wᵀ) ⊙ scale, W the integer weight of a linear of the plan, differentiable in x; no activation is kept.

    x: float32 [..., in]. scale: float32 [out]. The result is float32 [..., out]. Raises what `Products.product` does, also
    in backward, and there InputError for a linear that the plan has no backward product of.
    """
    result: Tensor = _RemoteLinear.apply(x, scale, products, linear)
    return result


class _RemoteLinear(torch.autograd.Function):
    """Compute y = (x·Wᵀ) ⊙ scale forward and dx = (dy ⊙ scale)·W backward, both by `products`. Keep no activation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, products: Products, linear: str) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.products, ctx.linear, ctx.shape = products, linear, x.shape
        if not x.numel():  # an expert that no token goes to is not asked
            return x.new_zeros(*x.shape[:-1], len(scale))
        product = products.product(f"{linear}.forward", x.reshape(-1, x.shape[-1]), row_scale=scale)  # [T, out]
        return product.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        if f"{ctx.linear}.backward" not in ctx.products.circuits:
            raise InputError(
                f"a gradient is wanted before {ctx.linear}, and the plan has no backward product of it, for at export no "
                "adapter stood before it: train nothing before it (embeddings, prompts, adapters of lower layers), do not "
                "call enable_input_require_grads, or export with adapters on lower layers"
            )
        (scale,) = ctx.saved_tensors
        if not gradients[0].numel():
            return gradients[0].new_zeros(ctx.shape), None, None, None
        flat = gradients[0].reshape(-1, gradients[0].shape[-1])  # [T, out]
        product = ctx.products.product(f"{ctx.linear}.backward", flat, column_scale=scale)  # [T, in]
        return product.view(ctx.shape), None, None, None
