"""One table: operator → differentiable torch function. The interpreter, calibration and the client run on it.

Standard operators follow the ONNX specification (opset 23) for the forms that the exporter emits; the `hecompile` domain is
defined here:

* `Linear(x, weight)`: y = x·Wᵀ, x [..., in], weight [out, in], float.
* `QuantizedLinear(x, weight, scale)`: y = (x·Wᵀ) ⊙ scale, weight int8 or int16 [out, in], scale f32 [out].
* `RemoteLinear(x, scale)`: the same product, W being known to the worker alone; computed by `context.remote`.
* `Lora(x, A, B; scaling, dropout)`: y = scaling · dropout(x)·Aᵀ·Bᵀ, A [r, in], B [out, r] (Hu et al., arXiv 2106.09685).
* `RMSNorm(x, weight; epsilon)`: x / sqrt(mean(x²) + ε) ⊙ weight over the last axis (Zhang & Sennrich, arXiv 1910.07467).
* `SiLU(x)`: x·sigmoid(x).
* `RotaryEmbedding(x, cos, sin)`: x ⊙ cos + rotate_half(x) ⊙ sin, x [B, heads, S, D], cos and sin [B, S, D]
  (Su et al., arXiv 2104.09864, in the half-split layout of Hugging Face).
* `RepeatKV(x; repeats)`: [B, kv_heads, S, D] → [B, kv_heads·repeats, S, D] (grouped-query attention).
* `Attention(q, k, v, bias; scale)`: softmax(q·kᵀ·scale + bias)·v, q, k and v [B, heads, S, D], bias broadcast to
  [B, heads, S, S]. With `context.sequences` the S positions of one row are several sequences one after the other, each
  of which attends to its own past alone; the bias is then not looked at.
* `SwiGLU(gate, up)`: SiLU(gate) ⊙ up.
* `GatedLora(x, A, B, gate, up; scaling, dropout)`: Lora(x, A, B) for x = SwiGLU(gate, up), of which it does not keep x.
* `Refresh(x)`: x; on ciphertexts, where the noise budget is renewed.

Those that stand for attention, normalisation and activation by polynomials are in
`hecompile.graph.polynomial_operators`, those on integers of few bits in `hecompile.graph.quantized_operators`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hecompile.graph.attention_cache import AttentionCache, causal_mask
from hecompile.graph.ir import DOMAIN

Attributes = Mapping[str, Any]
OperatorKey = tuple[str, str]
_INT64_MAX = np.iinfo(np.int64).max
_TORCH_DTYPES = {1: torch.float32, 11: torch.float64, 7: torch.int64, 6: torch.int32, 9: torch.bool, 3: torch.int8}


class RemoteProduct(Protocol):
    """What computes a `RemoteLinear`: x [..., in] → x·Wᵀ [..., out], W the integer weight of `linear`, scale [out]."""

    def __call__(self, linear: str, x: Tensor, scale: Tensor) -> Tensor: ...


@dataclass
class Context:
    """What a run needs besides values.

    training: whether LoRA's dropout is on; it draws from `generator`, torch's own where that is None.
    remote: who computes remote linears.
    sequences: lengths of the sequences that are packed into the only row of the batch; None for one sequence per row.
    cache: what attention has kept of the packed sequences' earlier tokens, and keeps of these; None to keep nothing.
    trainable: what multiplies by trainable matrices, (x [..., in], weight [out, in]) → x·weightᵀ; None for torch, whose
        gradient is the sum over all rows.
    """

    training: bool = False
    remote: RemoteProduct | None = None
    generator: torch.Generator | None = None
    sequences: tuple[int, ...] | None = None
    cache: AttentionCache | None = None
    trainable: Callable[[Tensor, Tensor], Tensor] | None = None


Operator = Callable[..., Any]
OPERATORS: dict[OperatorKey, Operator] = {}


def operator(op_type: str, domain: str = "") -> Callable[[Operator], Operator]:
    """Register a function `(context, attributes, *inputs) → tensor or tuple of tensors` for an operator."""

    def register(function: Operator) -> Operator:
        OPERATORS[domain, op_type] = function
        return function

    return register


def _elementwise(op_type: str, function: Callable[..., Tensor]) -> None:
    OPERATORS["", op_type] = lambda context, attributes, *inputs: function(*inputs)


_ELEMENTWISE: dict[str, Callable[..., Tensor]] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Div": torch.div,
    "Neg": torch.neg,
    "Pow": torch.pow,
    "Sqrt": torch.sqrt,
    "Reciprocal": torch.reciprocal,
    "Sigmoid": torch.sigmoid,
    "Cos": torch.cos,
    "Sin": torch.sin,
    "MatMul": torch.matmul,
    "Identity": lambda x: x,
}
for _name, _function in _ELEMENTWISE.items():
    _elementwise(_name, _function)


@operator("Gather")
def _gather(context: Context, attributes: Attributes, data: Tensor, indices: Tensor) -> Tensor:
    if attributes.get("axis", 0) == 0:
        return data[indices]
    return torch.index_select(data, attributes["axis"], indices.reshape(-1))


@operator("Cast")
def _cast(context: Context, attributes: Attributes, x: Tensor) -> Tensor:
    return x.to(_TORCH_DTYPES[int(attributes["to"])])


@operator("Unsqueeze")
def _unsqueeze(context: Context, attributes: Attributes, x: Tensor, axes: Tensor) -> Tensor:
    rank = x.dim() + axes.numel()
    for axis in sorted(int(a) % rank for a in axes.reshape(-1)):
        x = x.unsqueeze(axis)
    return x


@operator("Squeeze")
def _squeeze(context: Context, attributes: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    if axes is None:
        return x.squeeze()
    for axis in sorted((int(a) % x.dim() for a in axes.reshape(-1)), reverse=True):
        x = x.squeeze(axis)
    return x


@operator("Concat")
def _concat(context: Context, attributes: Attributes, *inputs: Tensor) -> Tensor:
    return torch.cat(inputs, dim=int(attributes["axis"]))


@operator("Shape")
def _shape(context: Context, attributes: Attributes, x: Tensor) -> Tensor:
    return torch.tensor(list(x.shape)[attributes.get("start", 0) : attributes.get("end", x.dim())], dtype=torch.int64)


@operator("Reshape")
def _reshape(context: Context, attributes: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    target = [int(dim) for dim in shape]
    if not attributes.get("allowzero", 0):
        target = [x.shape[axis] if dim == 0 else dim for axis, dim in enumerate(target)]
    return x.reshape(target)


@operator("Transpose")
def _transpose(context: Context, attributes: Attributes, x: Tensor) -> Tensor:
    return x.permute(tuple(attributes.get("perm", range(x.dim() - 1, -1, -1))))


@operator("Expand")
def _expand(context: Context, attributes: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, tuple(int(dim) for dim in shape)))


@operator("Slice")
def _slice(
    context: Context, attributes: Attributes, x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor, steps: Tensor
) -> Tensor:
    for start, end, axis, step in zip(starts.tolist(), ends.tolist(), axes.tolist(), steps.tolist(), strict=True):
        index: list[slice] = [slice(None)] * x.dim()
        index[axis] = slice(start, None if end == _INT64_MAX else end, step)
        x = x[tuple(index)]
    return x


@operator("Split")
def _split(context: Context, attributes: Attributes, x: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
    return torch.split(x, sizes.tolist(), dim=int(attributes.get("axis", 0)))


@operator("ReduceMean")
def _reduce_mean(context: Context, attributes: Attributes, x: Tensor, axes: Tensor) -> Tensor:
    return x.mean(dim=axes.tolist(), keepdim=bool(attributes.get("keepdims", 1)))


@operator("ReduceSum")
def _reduce_sum(context: Context, attributes: Attributes, x: Tensor, axes: Tensor) -> Tensor:
    return x.sum(dim=axes.tolist(), keepdim=bool(attributes.get("keepdims", 1)))


@operator("Softmax")
def _softmax(context: Context, attributes: Attributes, x: Tensor) -> Tensor:
    return torch.softmax(x, dim=int(attributes.get("axis", -1)))


# ------------------------------------------------------------------------------------------------- domain "hecompile"


@operator("Linear", DOMAIN)
def _linear(context: Context, attributes: Attributes, x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


@operator("QuantizedLinear", DOMAIN)
def _quantized_linear(context: Context, attributes: Attributes, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype)) * scale


@operator("RemoteLinear", DOMAIN)
def _remote_linear(context: Context, attributes: Attributes, x: Tensor, scale: Tensor) -> Tensor:
    if context.remote is None:
        raise ValueError(f"RemoteLinear {attributes['linear']}: this run has no worker; give Context(remote=...)")
    return context.remote(attributes["linear"], x, scale)


@operator("Lora", DOMAIN)
def _lora(context: Context, attributes: Attributes, x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    probability = attributes["dropout"]
    if _drops(context, attributes):
        # As torch's own dropout does on the CPU, which takes no generator.
        keep = torch.empty_like(x).bernoulli_(1 - probability, generator=context.generator)
        x = x * keep.div_(1 - probability)
    product = context.trainable or F.linear
    # The scaling goes where the tensor is r wide.
    return product(product(x, lora_a) * attributes["scaling"], lora_b)


@operator("RMSNorm", DOMAIN)
def _rms_norm(context: Context, attributes: Attributes, x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + attributes["epsilon"]))


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
    scale = attributes["scale"]
    if context.sequences is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        queries, keys = query.shape[2], key.shape[2]
        mask = causal_mask(queries, keys) if 1 < queries < keys else None
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=queries == keys, scale=scale)

    return attend_packed(context, q, k, v, attend)


def attend_packed(
    context: Context, q: Tensor, k: Tensor, v: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """Attention of `context.sequences`, each by itself: q, k and v [1, heads, S, D] → [1, heads, S, D].

    attend: (q [1, heads, n, D], k and v [1, heads, m, D]) → [1, heads, n, D] of one sequence; its queries are the last n of
    the m positions, all of them where nothing is cached.
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
    """SiLU(gate) ⊙ up, keeping gate and up for the gradient and nothing else."""

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
    """scaling · x·Aᵀ·Bᵀ for x = SiLU(gate) ⊙ up, which the gradient makes again from what SwiGLU keeps anyway."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lora_a: Tensor, lora_b: Tensor, gate: Tensor, up: Tensor, scaling: float
    ) -> Tensor:
        inner = F.linear(x, lora_a) * scaling  # [..., r]
        ctx.save_for_backward(lora_a, lora_b, gate, up, inner)
        ctx.scaling = scaling
        return F.linear(inner, lora_b)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        lora_a, lora_b, gate, up, inner = ctx.saved_tensors
        (gradient,) = gradients  # [..., out]
        to_inner = (gradient @ lora_b) * ctx.scaling  # [..., r]
        rows = to_inner.flatten(0, -2)  # [T, r]
        to_a = rows.t() @ F.silu(gate).mul_(up).flatten(0, -2)
        to_b = gradient.flatten(0, -2).t() @ inner.flatten(0, -2)
        return to_inner @ lora_a, to_a, to_b, None, None, None


@operator("GatedLora", DOMAIN)
def _gated_lora(
    context: Context, attributes: Attributes, x: Tensor, lora_a: Tensor, lora_b: Tensor, gate: Tensor, up: Tensor
) -> Tensor:
    # What dropout keeps is another x for each draw; and a caller's own product keeps what it needs.
    if _drops(context, attributes) or context.trainable is not None:
        return _lora(context, attributes, x, lora_a, lora_b)
    result: Tensor = _GatedLora.apply(x, lora_a, lora_b, gate, up, attributes["scaling"])
    return result


def _drops(context: Context, attributes: Attributes) -> bool:
    return bool(context.training and attributes["dropout"])


@operator("Refresh", DOMAIN)
def _refresh(context: Context, attributes: Attributes, x: Tensor) -> Tensor:
    return x
