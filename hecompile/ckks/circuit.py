"""Evaluates a polynomial graph on ciphertexts: one table operator → implementation, and the walk.

Values are CkksTensors (ciphertexts), or numpy arrays (constants). The batch runs along the slots, so that axis 0 of every
ciphertext tensor has size 1 here. A value is let go after its last use.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from hecompile.ckks.evaluator import CkksTensor, Evaluator, summed
from hecompile.errors import InputError, LegalityError
from hecompile.graph.ir import DOMAIN, attributes_of, constant_of
from hecompile.graph.legality import REFRESHED, check_stage

Constant = NDArray[Any]
Value = CkksTensor | Constant
Refresh = Callable[[str, CkksTensor], CkksTensor]
"""Name of the refreshed value, its ciphertexts → fresh ones of the same shape at the top level."""
Operation = Callable[[Evaluator, Mapping[str, Any], Any], Value | tuple[Value, ...]]


class PolynomialCircuit:
    """A prepared graph at stage `refreshed`. `run` is a pure function of its arguments.

    Raises LegalityError for an operator that has no implementation on ciphertexts.
    """

    def __init__(self, model: ir.Model) -> None:
        check_stage(model, REFRESHED)
        self.graph = model.graph
        self.constants: dict[str, Constant] = {}
        for name, initializer in model.graph.initializers.items():
            array = constant_of(initializer)
            if array is None:
                raise LegalityError(f"initializer {name} has no data")
            self.constants[name] = np.asarray(array)
        self._nodes = []
        for node in model.graph:
            if node.op_type == "Constant":
                array = constant_of(node.outputs[0])
                if array is None:
                    raise LegalityError(f"Constant {node.name}: only numeric tensors are supported")
                self.constants[str(node.outputs[0].name)] = np.asarray(array)
                continue
            if (node.domain, node.op_type) not in OPERATIONS and node.op_type != "Refresh":
                raise LegalityError(f"{node.op_type} ({node.name}) cannot be evaluated on ciphertexts")
            self._nodes.append(node)
        self._fused = {node for node in self._nodes if _only_summed(node)}
        self._last: dict[str, int] = {}
        for position, node in enumerate(self._nodes):
            # What a fused product reads must live until its sum.
            reads = [*node.inputs]
            for value in node.inputs:
                producer = None if value is None else value.producer()
                if producer is not None and producer in self._fused:
                    reads += producer.inputs
            self._last.update({str(value.name): position for value in reads if value is not None})

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Name → shape, the batch axis being 1."""
        return {str(value.name): shape_of(value) for value in self.graph.inputs}

    @property
    def refreshed(self) -> dict[str, tuple[int, ...]]:
        """Name of each value that is refreshed → its shape, the batch axis being 1."""
        nodes = [node for node in self._nodes if node.op_type == "Refresh"]
        return {str(node.outputs[0].name): shape_of(node.outputs[0]) for node in nodes}

    def run(
        self,
        evaluator: Evaluator,
        inputs: Mapping[str, CkksTensor],
        refresh: Refresh,
        seconds: dict[str, float] | None = None,
    ) -> CkksTensor:
        """The graph's output on ciphertexts. `seconds` collects time per operator."""
        spent = defaultdict(float) if seconds is None else seconds
        kept = {str(value.name) for value in self.graph.outputs} | self.constants.keys()
        values: dict[str, Any] = dict(self.constants)
        for name, shape in self.inputs.items():
            if name not in inputs:
                raise InputError(f"the circuit needs the input {name}")
            if inputs[name].index.shape != shape:
                raise InputError(f"input {name} has shape {inputs[name].index.shape}, the circuit takes {shape}")
            values[name] = inputs[name]
        for position, node in enumerate(self._nodes):
            start = time.perf_counter()
            outputs = [str(value.name) for value in node.outputs]
            if node in self._fused:
                values[outputs[0]] = node
            else:
                arguments: list[Any] = [None if value is None else values[str(value.name)] for value in node.inputs]
                if node.op_type == "Refresh":
                    result: Any = refresh(outputs[0], arguments[0])
                elif isinstance(arguments[0], ir.Node):
                    factors = [values[str(value.name)] for value in arguments[0].inputs if value is not None]
                    result = _sum_of_products(evaluator, attributes_of(node), factors, arguments[1:])
                else:
                    result = OPERATIONS[node.domain, node.op_type](evaluator, attributes_of(node), arguments)
                results = result if isinstance(result, tuple) else (result,)
                values.update(zip(outputs, results, strict=True))
            for value in node.inputs:
                self._drop(values, value, position, kept)
            name = "MatMul of ciphertexts" if node.op_type == "MatMul" else node.op_type
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - start
        (output,) = (str(value.name) for value in self.graph.outputs)
        found = values[output]
        if not isinstance(found, CkksTensor):
            raise LegalityError("the output of the circuit does not depend on its inputs")
        return found

    def _drop(self, values: dict[str, Any], value: ir.Value | None, position: int, kept: set[str]) -> None:
        if value is None:
            return
        name = str(value.name)
        if name in values and self._last[name] <= position and name not in kept:
            stored = values.pop(name)
            if isinstance(stored, ir.Node):
                for operand in stored.inputs:
                    self._drop(values, operand, position, kept)


def shape_of(value: ir.Value) -> tuple[int, ...]:
    """The static shape, 1 in place of the symbolic batch. Raises LegalityError for another symbolic axis."""
    if value.shape is None:
        raise LegalityError(f"{value.name} has no shape: the graph must be static but for the batch")
    dims = [dim if isinstance(dim, int) else None for dim in value.shape]
    if None in dims[1:]:
        raise LegalityError(f"{value.name} has shape {value.shape}: only the batch, axis 0, may be symbolic")
    return tuple(1 if dim is None else dim for dim in dims)


def _only_summed(node: ir.Node) -> bool:
    """A product of two ciphertexts whose one reader sums it: relinearised after the sum."""
    readers = list(node.outputs[0].consumers()) if node.op_type == "Mul" else []
    return len(readers) == 1 and readers[0].op_type == "ReduceSum" and not any(map(constant_like, node.inputs))


def constant_like(value: ir.Value | None) -> bool:
    return constant_of(value) is not None


def _sum_of_products(evaluator: Evaluator, attributes: Mapping[str, Any], factors: list[Any], rest: list[Any]) -> Value:
    a, b = factors
    if not isinstance(a, CkksTensor) or not isinstance(b, CkksTensor):
        return _reduce_sum(evaluator, attributes, [_mul(evaluator, {}, [a, b]), *rest])
    level = min(a.level, b.level)
    a, b = evaluator.lowered(a, level), evaluator.lowered(b, level)
    left, right = np.broadcast_arrays(a.index, b.index)
    axes, keep = _axes(attributes, rest, left.ndim)
    terms, shape = summed(left, axes, keep)
    return evaluator.product_sums(a, b, terms, summed(right, axes, keep)[0], shape)


def _axes(attributes: Mapping[str, Any], rest: list[Any], rank: int) -> tuple[tuple[int, ...], bool]:
    axes = tuple(int(axis) for axis in rest[0]) if rest and rest[0] is not None else tuple(range(rank))
    if any(axis % rank == 0 for axis in axes):
        raise LegalityError("a sum over the batch cannot be evaluated on ciphertexts: sequences are in the slots")
    return axes, bool(attributes.get("keepdims", 1))


def _binary(evaluator: Evaluator, arguments: list[Any], sign: int) -> Value:
    a, b = arguments
    if isinstance(a, CkksTensor) and isinstance(b, CkksTensor):
        return evaluator.add(a, b, sign)
    if isinstance(a, CkksTensor):
        return evaluator.add_constant(a, sign * np.asarray(b, dtype=np.float64))
    if isinstance(b, CkksTensor):
        return evaluator.add_constant(b if sign > 0 else _neg(evaluator, b), np.asarray(a, dtype=np.float64))
    return np.asarray(a + sign * b)


def _neg(evaluator: Evaluator, x: CkksTensor) -> CkksTensor:
    return evaluator.add(x.moved(np.full_like(x.index, -1)), x, -1)


def _mul(evaluator: Evaluator, _: Mapping[str, Any], arguments: list[Any]) -> Value:
    a, b = arguments
    if isinstance(a, CkksTensor) and isinstance(b, CkksTensor):
        return evaluator.multiply(a, b)
    if isinstance(a, CkksTensor):
        return evaluator.scale(a, np.asarray(b, dtype=np.float64))
    if isinstance(b, CkksTensor):
        return evaluator.scale(b, np.asarray(a, dtype=np.float64))
    return np.asarray(a * b)


def _matmul(evaluator: Evaluator, _: Mapping[str, Any], arguments: list[Any]) -> Value:
    a, b = arguments
    if isinstance(a, CkksTensor) and isinstance(b, CkksTensor):
        return evaluator.matmul(a, b)
    if isinstance(a, CkksTensor) and b.ndim == 2:
        return evaluator.linear(a, np.asarray(b, dtype=np.float64).T)
    if isinstance(b, CkksTensor) and a.ndim == 2:
        product = evaluator.linear(b.moved(np.swapaxes(b.index, -1, -2)), np.asarray(a, dtype=np.float64))
        return product.moved(np.swapaxes(product.index, -1, -2))
    raise LegalityError("MatMul by a constant needs a matrix of rank 2")


def _linear(evaluator: Evaluator, _: Mapping[str, Any], arguments: list[Any]) -> Value:
    return evaluator.linear(arguments[0], np.asarray(arguments[1], dtype=np.float64))


def _reduce_sum(evaluator: Evaluator, attributes: Mapping[str, Any], arguments: list[Any]) -> Value:
    axes, keep = _axes(attributes, arguments[1:], arguments[0].index.ndim)
    return evaluator.reduce_sum(arguments[0], axes, keep)


def _moving(move: Callable[[NDArray[Any], Mapping[str, Any], list[Any]], Any]) -> Operation:
    """An operator that moves entries: the same for constants and for ciphertexts, by their numbers."""

    def operation(_: Evaluator, attributes: Mapping[str, Any], arguments: list[Any]) -> Value | tuple[Value, ...]:
        x = arguments[0]
        if not isinstance(x, CkksTensor):
            moved = move(x, attributes, arguments[1:])
            return tuple(moved) if isinstance(moved, list) else moved
        moved = move(x.index, attributes, arguments[1:])
        return tuple(x.moved(part) for part in moved) if isinstance(moved, list) else x.moved(moved)

    return operation


def _reshape(x: NDArray[Any], attributes: Mapping[str, Any], rest: list[Any]) -> NDArray[Any]:
    target = [x.shape[axis] if size == 0 else int(size) for axis, size in enumerate(rest[0])]
    if target and target[0] == -1 and x.shape[0] == 1:
        target[0] = 1
    return x.reshape(target)


def _transpose(x: NDArray[Any], attributes: Mapping[str, Any], rest: list[Any]) -> NDArray[Any]:
    return x.transpose(attributes.get("perm") or range(x.ndim)[::-1])


def _unsqueeze(x: NDArray[Any], attributes: Mapping[str, Any], rest: list[Any]) -> NDArray[Any]:
    return np.expand_dims(x, tuple(int(axis) for axis in rest[0]))


def _squeeze(x: NDArray[Any], attributes: Mapping[str, Any], rest: list[Any]) -> NDArray[Any]:
    return np.squeeze(x, tuple(int(axis) for axis in rest[0]))


def _split(x: NDArray[Any], attributes: Mapping[str, Any], rest: list[Any]) -> list[NDArray[Any]]:
    axis = int(attributes.get("axis", 0))
    if rest and rest[0] is not None:
        return np.split(x, np.cumsum([int(size) for size in rest[0]])[:-1], axis=axis)
    return np.array_split(x, int(attributes["num_outputs"]), axis=axis)


def _slice(x: NDArray[Any], attributes: Mapping[str, Any], rest: list[Any]) -> NDArray[Any]:
    starts, ends = rest[:2]
    axes = rest[2] if len(rest) > 2 and rest[2] is not None else range(len(starts))
    steps = rest[3] if len(rest) > 3 and rest[3] is not None else [1] * len(starts)
    cut: list[Any] = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        cut[int(axis)] = slice(int(start), int(end), int(step))
    return x[tuple(cut)]


def _gather(x: NDArray[Any], attributes: Mapping[str, Any], rest: list[Any]) -> NDArray[Any]:
    return np.take(x, np.asarray(rest[0]), axis=int(attributes.get("axis", 0)))


def _concat(evaluator: Evaluator, attributes: Mapping[str, Any], arguments: list[Any]) -> Value:
    axis = int(attributes["axis"])
    if not any(isinstance(part, CkksTensor) for part in arguments):
        return np.concatenate(arguments, axis=axis)
    first = next(part for part in arguments if isinstance(part, CkksTensor))
    parts = []
    for part in arguments:
        if not isinstance(part, CkksTensor):
            if np.asarray(part).any():
                raise LegalityError("Concat of ciphertexts and constants other than zeros is not supported")
            part = first.moved(np.full(part.shape, -1, dtype=np.int64))
        parts.append(part)
    return evaluator.concat(parts, axis)


OPERATIONS: dict[tuple[str, str], Operation] = {
    ("", "Add"): lambda evaluator, _, arguments: _binary(evaluator, arguments, 1),
    ("", "Sub"): lambda evaluator, _, arguments: _binary(evaluator, arguments, -1),
    ("", "Neg"): lambda evaluator, _, arguments: _neg(evaluator, arguments[0]),
    ("", "Mul"): _mul,
    ("", "MatMul"): _matmul,
    ("", "ReduceSum"): _reduce_sum,
    ("", "Reshape"): _moving(_reshape),
    ("", "Transpose"): _moving(_transpose),
    ("", "Unsqueeze"): _moving(_unsqueeze),
    ("", "Squeeze"): _moving(_squeeze),
    ("", "Split"): _moving(_split),
    ("", "Slice"): _moving(_slice),
    ("", "Gather"): _moving(_gather),
    ("", "Concat"): _concat,
    (DOMAIN, "Linear"): _linear,
}
