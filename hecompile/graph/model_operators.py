"""Define the operators of the `hecompile` domain that a decoder, its adapter and its split plan are made of.

* `Linear(x, weight)`: y = x·Wᵀ, x [..., in], weight [out, in], float of x's type or of 16 bits.
* `QuantizedLinear(x, weight, scale)`: y = (x·Wᵀ) ⊙ scale, weight int8 or int16 [out, in], scale f32 [out].
* `RemoteLinear(x, scale)`: the product of `QuantizedLinear` with a W that the worker alone knows, by `context.remote`.
* `Rotate(x)`: x·Rᵀ, R the public orthogonal matrix of x's last axis (`hecompile.graph.rotation`).
* `Lora(x, A, B; scaling, dropout)`: y = scaling · dropout(x)·Aᵀ·Bᵀ, A [r, in], B [out, r] (Hu et al., arXiv 2106.09685).
* `RMSNorm(x, weight; epsilon)`: x / sqrt(mean(x²) + ε) ⊙ weight over the last axis (Zhang & Sennrich, arXiv 1910.07467).
* `SiLU(x)`: x·sigmoid(x).
* `RotaryEmbedding(x, cos, sin)`: x ⊙ cos + rotate_half(x) ⊙ sin, x [B, heads, S, D], cos and sin [B, S, D]
  (Su et al., arXiv 2104.09864, in the half-split layout of Hugging Face).
* `RepeatKV(x; repeats)`: [B, kv_heads, S, D] → [B, kv_heads·repeats, S, D] (grouped-query attention).
* `Attention(q, k, v, bias; scale, window, cap)`: softmax(q·kᵀ·scale + bias)·v, q, k and v [B, heads, S, D], bias broadcast
  to [B, heads, S, S]. With `context.sequences` the S positions of one row are several sequences one after the other, each
  of which attends to its own past alone; the bias is then not looked at. `window`, where it is there, is how many
  positions a query sees, itself included. `cap`, where it is there, bounds the scores s to cap·tanh(s/cap) (Gemma 2,
  arXiv 2408.00118).
* `SwiGLU(gate, up)`: SiLU(gate) ⊙ up.
* `GatedLora(x, A, B, gate, up; scaling, dropout)`: Lora(x, A, B) for x = SwiGLU(gate, up); it does not keep x.
* `TakeRows(x, weight)`: the rows of x [B, S, H] for which weight [B, S, 1] is not 0, [1, n, H].
* `PutRows(y, weight)`: these rows back at their places, [B, S, H], zeros elsewhere.
* `Refresh(x)`: x; on ciphertexts, where the noise budget is renewed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hecompile.graph.attention_cache import causal_mask
from hecompile.graph.ir import DOMAIN
from hecompile.graph.operators import Attributes, Context, operator
from hecompile.graph.rotation import rotate


@operator("Linear", DOMAIN)
def _linear(context: Context, attributes: Attributes, x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype))


@operator("QuantizedLinear", DOMAIN)
def _quantized_linear(context: Context, attributes: Attributes, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype)) * scale


@operator("RemoteLinear", DOMAIN)
def _remote_linear(context: Context, attributes: Attributes, x: Tensor, scale: Tensor) -> Tensor:
    if context.remote is None:
        raise ValueError(f"RemoteLinear {attributes['linear']}: this run has no worker; give Context(remote=...)")
    return context.remote(attributes["linear"], x, scale)


@operator("Rotate", DOMAIN)
def _rotate(context: Context, attributes: Attributes, x: Tensor) -> Tensor:
    return rotate(x)


@operator("Lora", DOMAIN)
def _lora(context: Context, attributes: Attributes, x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    probability = attributes["dropout"]
    if _drops(context, attributes):
        # As torch's own dropout does on the CPU, which takes no generator.
        keep = torch.empty_like(x).bernoulli_(1 - probability, generator=context.generator)
        x = x * keep.div_(1 - probability)
    if context.trainable is not None:
        # The scaling goes where the tensor is r wide.
        return context.trainable(context.trainable(x, lora_a) * attributes["scaling"], lora_b)
    result: Tensor = _LowRank.apply(x, lora_a, lora_b, attributes["scaling"])
    return result


class _LowRank(torch.autograd.Function):
    """Compute scaling · x·Aᵀ·Bᵀ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
        inner = _narrow_product(x, lora_a) * scaling  # [..., r]
        ctx.save_for_backward(x, lora_a, lora_b, inner)
        ctx.scaling = scaling
        return F.linear(inner, lora_b)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        x, lora_a, lora_b, inner = ctx.saved_tensors
        to_x, to_a, to_b = _low_rank_gradients(gradients[0], lora_a, lora_b, inner, ctx.scaling, x)
        return to_x if ctx.needs_input_grad[0] else None, to_a, to_b, None


def _narrow_product(x: Tensor, few: Tensor) -> Tensor:
    """Return x·fewᵀ for x [..., n] and few rows [r, n], [..., r].

    As few·xᵀ it takes half the time: what is wide is then the product's last axis but one, and what is narrow its first.
    """
    return (few.contiguous() @ x.flatten(0, -2).t()).t().view(*x.shape[:-1], len(few))


def _low_rank_gradients(
    gradient: Tensor, lora_a: Tensor, lora_b: Tensor, inner: Tensor, scaling: float, x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, A and B for that of y = inner·Bᵀ [..., out] and inner = scaling · x·Aᵀ [..., r].

    That of B is the transpose of a product whose rows are few, for torch takes five times as long for the product itself.
    """
    to_inner = _narrow_product(gradient, lora_b.t()) * scaling  # [..., r]
    to_a = to_inner.flatten(0, -2).t() @ x.flatten(0, -2)  # [r, in]
    to_b = (inner.flatten(0, -2).t() @ gradient.flatten(0, -2)).t()  # [out, r]
    return to_inner @ lora_a, to_a, to_b


@operator("RMSNorm", DOMAIN)
def _rms_norm(context: Context, attributes: Attributes, x: Tensor, weight: Tensor) -> Tensor:
    result: Tensor = _RMSNorm.apply(x, weight, attributes["epsilon"])
    return result


class _RMSNorm(torch.autograd.Function):
    """Compute x·ρ ⊙ w with ρ = 1/sqrt(mean(x²) + ε), and keep x alone: torch's own graph keeps two tensors of its size more.

    With g' = w ⊙ g: dx = ρ·(g' - x·ρ²·mean(g' ⊙ x)), dw = the sum over the tokens of g ⊙ x·ρ.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = torch.rsqrt(length.square() / x.shape[-1] + epsilon)  # [..., 1]
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        (gradient,) = gradients
        to_weight = to_x = None
        if ctx.needs_input_grad[1]:
            to_weight = (gradient * x * inverse).flatten(0, -2).sum(dim=0)
        if ctx.needs_input_grad[0]:
            inner = gradient * weight  # [..., n]
            along = torch.linalg.vecdot(inner, x)[..., None] / x.shape[-1]  # mean(g' ⊙ x), [..., 1]
            to_x = inner.addcmul_(x, along * inverse.square(), value=-1.0).mul_(inverse)
        return to_x, to_weight, None


@operator("SiLU", DOMAIN)
def _silu(context: Context, attributes: Attributes, x: Tensor) -> Tensor:
    return F.silu(x)


@operator("RotaryEmbedding", DOMAIN)
def _rotary_embedding(context: Context, attributes: Attributes, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)  # [B, heads, S, D/2] each
    rotated = torch.cat((-second, first), dim=-1)  # [B, heads, S, D]
    return x * cos.unsqueeze(1) + rotated * sin.unsqueeze(1)


@operator("RepeatKV", DOMAIN)
def _repeat_kv(context: Context, attributes: Attributes, x: Tensor) -> Tensor:
    batch, heads, length, size = x.shape
    expanded = x[:, :, None].expand(batch, heads, attributes["repeats"], length, size)
    return expanded.reshape(batch, heads * attributes["repeats"], length, size)


@operator("Attention", DOMAIN)
def _attention(context: Context, attributes: Attributes, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scale, window, cap = attributes["scale"], attributes.get("window"), attributes.get("cap")
    if context.sequences is None:
        if cap is not None:
            return _capped_attention(q, k, v, bias, scale, cap)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        queries, keys = query.shape[2], key.shape[2]
        narrow = window if window is not None and window < keys else None
        if cap is not None:
            bias = torch.zeros(queries, keys).masked_fill_(~causal_mask(queries, keys, narrow), -math.inf)
            return _capped_attention(query, key, value, bias, scale, cap)
        mask = causal_mask(queries, keys, narrow) if 1 < queries < keys or narrow is not None else None
        causal = mask is None and queries == keys
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scale)

    return attend_packed(context, q, k, v, attend)


def _capped_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, cap: float) -> Tensor:
    """Compute softmax(cap·tanh(q·kᵀ·scale/cap) + bias)·v."""
    scores = torch.tanh(q @ k.transpose(-2, -1) * (scale / cap)) * cap  # [B, heads, queries, keys]
    return torch.softmax(scores + bias, dim=-1) @ v


def attend_packed(
    context: Context, q: Tensor, k: Tensor, v: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """Apply attention to each of `context.sequences` by itself: q, k and v [1, heads, S, D] → [1, heads, S, D].

    attend: (q [1, heads, n, D], k and v [1, heads, m, D]) → [1, heads, n, D] of one sequence. Its queries are the last n of
    the m positions; n = m where nothing is cached.
    """
    assert context.sequences is not None
    queries, keys, values = (
        part.split(context.sequences, dim=2) for part in (q, k, v)
    )  # [1, heads, L, D] per sequence
    pasts = list(zip(keys, values, strict=True)) if context.cache is None else context.cache.extend(keys, values)
    outputs = [attend(query, *past) for query, past in zip(queries, pasts, strict=True)]
    if len(outputs) == 1:
        return outputs[0]
    # Joined position by position, as the projection after it reads them: its reshape then copies nothing.
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1).transpose(1, 2)  # [1, heads, S, D]


class _SwiGLU(torch.autograd.Function):
    """Compute SiLU(gate) ⊙ up and keep only gate and up for the gradient."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        (gradient,) = gradients
        to_gate = torch.ops.aten.silu_backward(gradient * up, gate)
        return to_gate, F.silu(gate).mul_(gradient)


@operator("SwiGLU", DOMAIN)
def _swiglu(context: Context, attributes: Attributes, gate: Tensor, up: Tensor) -> Tensor:
    result: Tensor = _SwiGLU.apply(gate, up)
    return result


class _GatedLora(torch.autograd.Function):
    """Compute scaling · x·Aᵀ·Bᵀ for x = SiLU(gate) ⊙ up; the gradient computes x again from what SwiGLU keeps anyway."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lora_a: Tensor, lora_b: Tensor, gate: Tensor, up: Tensor, scaling: float
    ) -> Tensor:
        inner = _narrow_product(x, lora_a) * scaling  # [..., r]
        ctx.save_for_backward(lora_a, lora_b, gate, up, inner)
        ctx.scaling = scaling
        return F.linear(inner, lora_b)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        lora_a, lora_b, gate, up, inner = ctx.saved_tensors
        x = F.silu(gate).mul_(up)
        to_x, to_a, to_b = _low_rank_gradients(gradients[0], lora_a, lora_b, inner, ctx.scaling, x)
        return to_x, to_a, to_b, None, None, None


@operator("GatedLora", DOMAIN)
def _gated_lora(
    context: Context, attributes: Attributes, x: Tensor, lora_a: Tensor, lora_b: Tensor, gate: Tensor, up: Tensor
) -> Tensor:
    # Dropout makes another x for each draw, and a caller's own product keeps the x that it needs.
    if _drops(context, attributes) or context.trainable is not None:
        return _lora(context, attributes, x, lora_a, lora_b)
    result: Tensor = _GatedLora.apply(x, lora_a, lora_b, gate, up, attributes["scaling"])
    return result


def _drops(context: Context, attributes: Attributes) -> bool:
    return bool(context.training and attributes["dropout"])


@operator("TakeRows", DOMAIN)
def _take_rows(context: Context, attributes: Attributes, x: Tensor, weight: Tensor) -> Tensor:
    return x[weight[..., 0] != 0][None]


@operator("PutRows", DOMAIN)
def _put_rows(context: Context, attributes: Attributes, y: Tensor, weight: Tensor) -> Tensor:
    places = (weight[..., 0] != 0).nonzero(as_tuple=True)
    return y.new_zeros(*weight.shape[:-1], y.shape[-1]).index_put(places, y[0])


@operator("Refresh", DOMAIN)
def _refresh(context: Context, attributes: Attributes, x: Tensor) -> Tensor:
    return x
