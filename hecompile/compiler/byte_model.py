"""Give a model weights of one byte each for as long as it writes text: in float32 those of a large model would not fit.

    W ≈ diag(s)·Q,  Q int8,  s_i = max_j |W_ij| / 127       x ≈ t·(256·h + l),  h and l int8
    x·Wᵀ ≈ t·(256·h·Qᵀ + l·Qᵀ)·diag(s)

The activations keep 15 bits, so that the rounding of the weights is all that counts. The model then writes not quite what
it would have written in float32, but text of the same kind, which is what calibration wants.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from hecompile.checkpoint.weights import Weights
from hecompile.compiler.experts import experts_apart
from hecompile.he.setup import limb_product_is_exact

_LARGEST, _LARGEST_ROW = 127, 127 * 256 + 127


class _Bytes:
    """Hold a matrix [rows, columns] in bytes, and the scale of each row."""

    def __init__(self, matrix: Tensor) -> None:
        scale = matrix.abs().amax(dim=1) / _LARGEST  # [rows]
        self.scale = torch.where(scale > 0, scale, 1.0)
        self.matrix = torch.empty(matrix.shape, dtype=torch.int8)
        for start in range(0, len(matrix), 4096):  # no second copy in float32
            rows = slice(start, start + 4096)
            self.matrix[rows] = (matrix[rows] / self.scale[rows, None]).round_().to(torch.int8)

    def rows(self, indices: Tensor) -> Tensor:
        """Return float32 rows [..., columns]."""
        return self.matrix[indices] * self.scale[indices][..., None]

    def times(self, x: Tensor) -> Tensor:
        """Return x·Wᵀ, float32, of x [T, columns]."""
        if not limb_product_is_exact():
            return (x @ self.matrix.float().t()) * self.scale
        step = (x.abs().amax(dim=1, keepdim=True) / _LARGEST_ROW).clamp_min(1e-30)  # [T, 1]
        whole = (x / step).round_().to(torch.int32)
        high = (whole + 128) >> 8
        digits = torch.cat([high, whole - (high << 8)]).to(torch.int8)  # [2T, columns]
        product = torch._int_mm(self.matrix, digits.t().contiguous()).t().float()  # [2T, rows]
        return (product[: len(x)] * 256 + product[len(x) :]) * step * self.scale


class _ByteLinear(torch.nn.Module):
    def __init__(self, weight: _Bytes, bias: Tensor | None) -> None:
        super().__init__()
        self._weight, self._bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        y = self._weight.times(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)
        return y if self._bias is None else y + self._bias


class _ByteEmbedding(torch.nn.Module):
    def __init__(self, table: _Bytes) -> None:
        super().__init__()
        self._table = table

    def forward(self, indices: Tensor) -> Tensor:
        return self._table.rows(indices)


@contextmanager
def in_bytes(model: torch.nn.Module, weights: Weights) -> Iterator[None]:
    """Give a hollow `model` its weights: linears and the embedding in bytes, everything else in float32.

    Raises InputError for weights that cannot be read or are not finite.
    """
    with experts_apart(model):
        matrices: dict[tuple[str, ...], _Bytes] = {}  # of the file: a tied head is the embedding
        replaced: list[tuple[Any, str, torch.nn.Module]] = []
        zeros: dict[torch.nn.Parameter, Tensor] = {}
        try:
            for name, module in list(model.named_modules()):
                made = _in_bytes(name, module, weights, matrices)
                if made is not None:
                    parent, _, last = name.rpartition(".")
                    replaced.append((model.get_submodule(parent), last, module))
                    setattr(replaced[-1][0], last, made)
            for name, parameter in model.named_parameters():
                zeros[parameter] = parameter.data
                parameter.data = weights.read(name)
            yield
        finally:
            for parameter, data in zeros.items():
                parameter.data = data
            for parent, last, module in reversed(replaced):
                setattr(parent, last, module)


def _in_bytes(
    name: str, module: torch.nn.Module, weights: Weights, matrices: dict[tuple[str, ...], _Bytes]
) -> torch.nn.Module | None:
    """Return what stands for a linear or an embedding; None for any other module."""
    if type(module) not in (torch.nn.Linear, torch.nn.Embedding, Conv1D):
        return None
    parts = tuple(weights.parts(f"{name}.weight"))
    if parts not in matrices:
        weight = weights.read(f"{name}.weight")
        matrices[parts] = _Bytes(weight.t() if type(module) is Conv1D else weight)
    if type(module) is torch.nn.Embedding:
        return _ByteEmbedding(matrices[parts])
    bias = None if getattr(module, "bias", None) is None else weights.read(f"{name}.bias")
    return _ByteLinear(matrices[parts], bias)
