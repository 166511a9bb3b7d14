"""Keep one table: operator → differentiable torch function. The interpreter, calibration and the client run on it.

The standard operators below follow the ONNX specification (opset 23) for the forms that the exporter emits. Those of the
`hecompile` domain are in `hecompile.graph.model_operators` (what a decoder is made of), `polynomial_operators` (polynomials
in the place of attention, normalisation and activation) and `quantized_operators` (integers of few bits).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hecompile.graph.attention_cache import AttentionCache

Attributes = Mapping[str, Any]
OperatorKey = tuple[str, str]
_INT64_MAX = np.iinfo(np.int64).max
_TORCH_DTYPES = {1: torch.float32, 11: torch.float64, 7: torch.int64, 6: torch.int32, 9: torch.bool, 3: torch.int8}


class RemoteProduct(Protocol):
    """Compute a `RemoteLinear`: x [..., in] → (x·Wᵀ) ⊙ scale [..., out], W the integer weight of `linear`, scale [out]."""

    def __call__(self, linear: str, x: Tensor, scale: Tensor) -> Tensor: ...


@dataclass
class Context:
    """Hold what a run needs besides values.

    training: whether LoRA's dropout is on; it draws from `generator`, torch's own where that is None.
    remote: computes remote linears.
    sequences: lengths of the sequences that are packed into the only row of the batch; None for one sequence per row.
    cache: keys and values of the packed sequences' earlier tokens, to which these are added; None to keep none.
    trainable: multiplies by trainable matrices, (x [..., in], weight [out, in]) → x·weightᵀ; None for torch, whose
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
    "Tanh": torch.tanh,
    "Erf": torch.erf,
    "Relu": torch.relu,
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


@operator("Gelu")
def _gelu(context: Context, attributes: Attributes, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=attributes.get("approximate", "none"))


@operator("LayerNormalization")
def _layer_normalization(
    context: Context, attributes: Attributes, x: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    axis = int(attributes.get("axis", -1)) % x.dim()
    shape = x.shape[axis:]
    shift = None if bias is None else bias.expand(shape)
    return F.layer_norm(x, shape, scale.expand(shape), shift, attributes.get("epsilon", 1e-5))


@operator("TopK")
def _top_k(context: Context, attributes: Attributes, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    values, indices = torch.topk(x, int(k), dim=int(attributes.get("axis", -1)), largest=bool(attributes.get("largest", 1)))
    return values, indices


@operator("ScatterElements")
def _scatter_elements(context: Context, attributes: Attributes, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    return x.scatter(int(attributes.get("axis", 0)), indices, updates)


@operator("Softmax")
def _softmax(context: Context, attributes: Attributes, x: Tensor) -> Tensor:
    return torch.softmax(x, dim=int(attributes.get("axis", -1)))
