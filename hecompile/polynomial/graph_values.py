"""Build a graph of sums and products from values that put constants off until they cost no level.

A `GraphValue` stands for factor · value. A constant factor travels through sums, products and moves of entries without a
node and ends in the weight of the next Linear, or on the shallower operand of a product, where it does not deepen the
graph. Its level is its multiplicative depth: one for a product, by a constant or not, none for sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from hecompile.graph.ir import DOMAIN, ORIGIN, add_initializer

Dim = int | str
_MILD = 4.0
"""Factors from 1/4 to 4 may travel on; others would make the values behind them large or small."""
_LARGEST_OFFSET = 1024.0


class GraphBuilder:
    """Append nodes to `graph`; equal scalars and equally scaled weights are stored once."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.origin = ""
        """Module path that new nodes are stamped with."""
        self._scaled: dict[tuple[ir.Value, float], GraphValue] = {}
        self._scalars: dict[float, ir.Value] = {}
        self._weights: dict[tuple[str, bytes], ir.Value] = {}
        self._count = 0

    def constant(self, array: np.ndarray) -> ir.Value:
        """Return an initializer f32 or i64; equal scalars share one."""
        if array.dtype != np.int64:
            array = array.astype(np.float32)
        if array.ndim == 0 and array.dtype == np.float32:
            key = float(array)
            if key not in self._scalars:
                self._scalars[key] = add_initializer(self.graph, f"c{len(self._scalars)}", array)
            return self._scalars[key]
        self._count += 1
        return add_initializer(self.graph, f"k{self._count}", array)

    def emit(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        shape: tuple[Dim, ...],
        level: int,
        factor: float | np.ndarray = 1.0,
        domain: str = "",
        **attributes: int | list[int],
    ) -> GraphValue:
        """Append a node with one output, of this shape, level and factor."""
        node = ir.node(op_type, list(inputs), attributes, domain=domain, metadata_props={ORIGIN: self.origin})
        self._count += 1
        node.outputs[0].name = f"v{self._count}"
        self._finish(node.outputs[0], shape)
        self.graph.append(node)
        return GraphValue(self, node.outputs[0], shape, level, factor)

    def _finish(self, value: ir.Value, shape: tuple[Dim, ...]) -> None:
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)

    def linear(self, x: GraphValue, weight: ir.Value, array: np.ndarray, scale: float = 1.0) -> GraphValue:
        """Return scale · x·Wᵀ; the scale and x's factor, a number or one per feature, go into the weight."""
        factor = np.asarray(x.factor * scale, dtype=np.float64)
        key = (str(weight.name), factor.tobytes())
        if key not in self._weights:
            plain = factor.ndim == 0 and factor == 1.0
            values = array if plain else (array * factor).astype(np.float32)
            taken = sum(1 for name, _ in self._weights if name == weight.name)
            name = f"{weight.name}" + (f".{taken}" if taken else "")
            self._weights[key] = add_initializer(self.graph, name, values)
        shape = (*x.shape[:-1], int(array.shape[0]))
        return self.emit("Linear", [x.value, self._weights[key]], shape, x.level + 1, domain=DOMAIN)

    def scaled(self, x: GraphValue, factor: float) -> GraphValue:
        """Return x.value·factor as a node, made once; x's own factor is left out."""
        if factor == 1.0:
            return GraphValue(self, x.value, x.shape, x.level)
        key = (x.value, factor)
        if key not in self._scaled:
            if factor == -1.0:
                self._scaled[key] = self.emit("Neg", [x.value], x.shape, x.level)
            else:
                constant = self.constant(np.float32(factor))  # type: ignore[arg-type]
                self._scaled[key] = self.emit("Mul", [x.value, constant], x.shape, x.level + 1)
        return self._scaled[key]


@dataclass(frozen=True, eq=False)
class GraphValue:
    """Represent factor · value. `factor`: a number, or an array [last axis]. `shape`: "B" stands for the batch."""

    builder: GraphBuilder
    value: ir.Value
    shape: tuple[Dim, ...]
    level: int
    factor: float | np.ndarray = 1.0

    # ------------------------------------------------------------------------------------------------------- constants

    def settled(self) -> GraphValue:
        """Return this value with factor 1: a node, unless the factor was 1 already."""
        if isinstance(self.factor, np.ndarray):
            constant = self.builder.constant(self.factor)
            return self.builder.emit("Mul", [self.value, constant], self.shape, self.level + 1)
        return self.builder.scaled(self, self.factor)

    def plain(self) -> GraphValue:
        """Return this value with a number for a factor, not an array."""
        return self.settled() if isinstance(self.factor, np.ndarray) else self

    def with_factor(self, factor: float | np.ndarray) -> GraphValue:
        if isinstance(factor, (int, float)) and abs(factor - 1.0) < 1e-12:
            factor = 1.0
        return GraphValue(self.builder, self.value, self.shape, self.level, factor)

    def gain(self, vector: np.ndarray) -> GraphValue:
        """Multiply by one number per feature, put off."""
        return self.with_factor(np.asarray(self.factor * vector.astype(np.float64)))

    def times_array(self, array: np.ndarray) -> GraphValue:
        """Multiply by a constant array, elementwise, at once; the factor goes into it."""
        array = array * self.factor
        shape = _broadcast(self.shape, array.shape)
        return self.builder.emit("Mul", [self.value, self.builder.constant(array)], shape, self.level + 1)

    def masked(self, mask: np.ndarray) -> GraphValue:
        """Multiply by zeros and ones: entries are dropped, no level is used."""
        shape = _broadcast(self.shape, mask.shape)
        return self.builder.emit("Mul", [self.value, self.builder.constant(mask)], shape, self.level, self.factor)

    # ------------------------------------------------------------------------------------------------------ arithmetic

    def __add__(self, other: GraphValue | float) -> GraphValue:
        if isinstance(other, GraphValue):
            return _sum(self, other)
        x = self.plain()
        if abs(other / x.factor) > _LARGEST_OFFSET:  # type: ignore[operator]
            x = x.settled()
        if other == 0.0:
            return x
        constant = self.builder.constant(np.float32(other / x.factor))  # type: ignore[arg-type]
        return self.builder.emit("Add", [x.value, constant], x.shape, x.level, x.factor)

    def __sub__(self, other: GraphValue | float) -> GraphValue:
        return self + (other * -1.0 if isinstance(other, GraphValue) else -other)

    def __mul__(self, other: GraphValue | float) -> GraphValue:
        if not isinstance(other, GraphValue):
            return self.with_factor(self.factor * other)
        a, b, factor = _factored(self, other)
        shape = _broadcast(a.shape, b.shape)
        level = max(a.level, b.level) + 1
        return self.builder.emit("Mul", [a.value, b.value], shape, level).with_factor(factor)

    def __matmul__(self, other: GraphValue) -> GraphValue:
        a, b, factor = _factored(self.plain(), other.plain())
        shape = (*_broadcast(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
        level = max(a.level, b.level) + 1
        return self.builder.emit("MatMul", [a.value, b.value], shape, level).with_factor(factor)

    def summed(self, axis: int = -1) -> GraphValue:
        """Sum along an axis, which is kept with size 1."""
        x = self.plain()
        place = axis % len(x.shape)
        shape = tuple(1 if index == place else dim for index, dim in enumerate(x.shape))
        axes = self.builder.constant(np.array([place], dtype=np.int64))
        return self.builder.emit("ReduceSum", [x.value, axes], shape, x.level, x.factor, keepdims=1)

    # ------------------------------------------------------------------------------------------------- moves of entries

    def transposed(self, perm: Sequence[int]) -> GraphValue:
        x = self.plain()
        shape = tuple(x.shape[axis] for axis in perm)
        return self.builder.emit("Transpose", [x.value], shape, x.level, x.factor, perm=list(perm))

    def reshaped(self, shape: tuple[Dim, ...]) -> GraphValue:
        """Reshape; the batch stays the first axis."""
        x = self.plain()
        target = np.array([0 if isinstance(dim, str) else dim for dim in shape], dtype=np.int64)
        return self.builder.emit("Reshape", [x.value, self.builder.constant(target)], shape, x.level, x.factor)

    def sliced(self, axis: int, start: int, end: int) -> GraphValue:
        x = self.plain()
        shape = tuple(end - start if index == axis else dim for index, dim in enumerate(x.shape))
        bounds = [self.builder.constant(np.array([number], dtype=np.int64)) for number in (start, end, axis, 1)]
        return self.builder.emit("Slice", [x.value, *bounds], shape, x.level, x.factor)


def concatenated(parts: Sequence[GraphValue], axis: int) -> GraphValue:
    """Concatenate along an axis; parts with different factors are settled first."""
    values = [part.plain() for part in parts]
    if len({value.factor for value in values}) > 1:
        values = [value.settled() for value in values]
    first = values[0]
    place = axis % len(first.shape)
    total = sum(int(value.shape[place]) for value in values)
    shape = tuple(total if index == place else dim for index, dim in enumerate(first.shape))
    level = max(value.level for value in values)
    inputs = [value.value for value in values]
    return first.builder.emit("Concat", inputs, shape, level, first.factor, axis=place)


def _sum(a: GraphValue, b: GraphValue) -> GraphValue:
    shape = _broadcast(a.shape, b.shape)
    if np.array_equal(a.factor, b.factor):
        return a.builder.emit("Add", [a.value, b.value], shape, max(a.level, b.level), a.factor)
    a, b = a.plain(), b.plain()
    deep, shallow = (a, b) if a.level >= b.level else (b, a)
    assert isinstance(deep.factor, float) and isinstance(shallow.factor, float)
    ratio = shallow.factor / deep.factor
    if ratio == -1.0:
        inputs = [deep.value, shallow.value]
        return a.builder.emit("Sub", inputs, shape, max(a.level, b.level), deep.factor)
    if not _mild(ratio) or not _mild(deep.factor):
        deep, ratio = deep.settled(), shallow.factor
    scaled = a.builder.scaled(shallow, ratio)
    level = max(deep.level, scaled.level)
    return a.builder.emit("Add", [deep.value, scaled.value], shape, level, deep.factor)


def _factored(a: GraphValue, b: GraphValue) -> tuple[GraphValue, GraphValue, float | np.ndarray]:
    """Return both operands of a product and the factor that is left of theirs.

    A factor that may not travel on goes into the shallower operand, which gets no deeper than the other by that.
    """
    if isinstance(a.factor, np.ndarray) or isinstance(b.factor, np.ndarray):
        if a.shape[-1] == b.shape[-1]:
            return a, b, a.factor * b.factor
        a, b = a.plain(), b.plain()
    factor = float(a.factor * b.factor)
    if _mild(factor) or a.level == b.level:
        return a, b, factor
    if a.level < b.level:
        return a.builder.scaled(a, factor), b, 1.0
    return a, b.builder.scaled(b, factor), 1.0


def _mild(factor: float) -> bool:
    return 1 / _MILD <= abs(factor) <= _MILD


def _broadcast(a: Sequence[Dim], b: Sequence[Dim]) -> tuple[Dim, ...]:
    """Broadcast two shapes by NumPy's rule; the batch goes with 1 and with itself. Raises ValueError where they do not."""
    longer, shorter = (tuple(a), tuple(b)) if len(a) >= len(b) else (tuple(b), tuple(a))
    padded = (1,) * (len(longer) - len(shorter)) + shorter
    result: list[Dim] = []
    for left, right in zip(longer, padded, strict=True):
        if left != right and 1 not in (left, right):
            raise ValueError(f"shapes {a} and {b} do not broadcast")
        result.append(right if left == 1 else left)
    return tuple(result)
