"""Keep constants of a graph out of memory: each is read, or made of others, whenever a pass asks for it, and let go after.

`constant_of` reads such a constant as any other. Nothing is cached, so that a graph holds no more than what a pass has asked
for; a pass should ask once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import DTypeLike
from torch import Tensor

Read = Callable[[], np.ndarray]

KeepRows = Callable[[str, Tensor], Tensor]
"""Put float32 [T, features] somewhere, and return it from there; the name is for the reader alone."""

Keep = Callable[[str, np.ndarray], ir.TensorProtocol]
"""Put an array where a graph can be given it from, under a name that is not taken, and return its constant."""


def in_memory(name: str, array: np.ndarray) -> ir.TensorProtocol:
    """Keep an array as it is."""
    return ir.Tensor(array, name=name)


def rows_in_memory(name: str, rows: Tensor) -> Tensor:
    """Keep rows as they are."""
    return rows


def lazy_tensor(name: str, shape: Sequence[int], dtype: DTypeLike, read: Read) -> ir.TensorProtocol:
    """Make the constant whose array of this shape and type `read` returns, at each call anew."""
    return ir.LazyTensor(
        lambda: ir.Tensor(read(), name=name),
        dtype=ir.DataType.from_numpy(np.dtype(dtype)),
        shape=ir.Shape(shape),
        name=name,
    )


def is_lazy(value: ir.Value | None) -> bool:
    """Tell whether a value is a constant that is read when it is wanted."""
    return value is not None and isinstance(value.const_value, ir.LazyTensor)


def add_constant(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Register a constant under `name` and return its value. Raises ValueError when the name is taken."""
    if name in graph.initializers:
        raise ValueError(f"initializer {name} exists already")
    value = ir.Value(name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype))
    value.const_value = tensor
    graph.initializers[name] = value
    return value
