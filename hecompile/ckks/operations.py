"""Implement the operators of polynomial graphs on ciphertexts: one table, operator → implementation.

An argument is a CkksTensor or a constant, which is a numpy array. Axis 0 is the batch, which runs along the slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hecompile.ckks.evaluator import CkksTensor, Evaluator, sum_terms
from hecompile.errors import LegalityError
from hecompile.graph.ir import DOMAIN

Value = CkksTensor | NDArray[Any]
Operation = Callable[[Evaluator, Mapping[str, Any], Any], Value | tuple[Value, ...]]


def sum_of_products(evaluator: Evaluator, attributes: Mapping[str, Any], factors: list[Any], rest: list[Any]) -> Value:
    """Evaluate ReduceSum(Mul(factors), *rest) with one relinearisation for each result."""
    a, b = factors
    if not isinstance(a, CkksTensor) or not isinstance(b, CkksTensor):
        return _reduce_sum(evaluator, attributes, [_mul(evaluator, {}, [a, b]), *rest])
    level = min(a.level, b.level)
    a, b = evaluator.lowered(a, level), evaluator.lowered(b, level)
    left, right = np.broadcast_arrays(a.index, b.index)
    axes, keep = _axes(attributes, rest, left.ndim)
    terms, shape = sum_terms(left, axes, keep)
    return evaluator.product_sums(a, b, terms, sum_terms(right, axes, keep)[0], shape)


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


def _rearranging(move: Callable[[NDArray[Any], Mapping[str, Any], list[Any]], Any]) -> Operation:
    """Make an operator of a function that rearranges entries: those of constants, or the element numbers of ciphertexts."""

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
    ("", "Reshape"): _rearranging(_reshape),
    ("", "Transpose"): _rearranging(_transpose),
    ("", "Unsqueeze"): _rearranging(_unsqueeze),
    ("", "Squeeze"): _rearranging(_squeeze),
    ("", "Split"): _rearranging(_split),
    ("", "Slice"): _rearranging(_slice),
    ("", "Gather"): _rearranging(_gather),
    ("", "Concat"): _concat,
    (DOMAIN, "Linear"): _linear,
}
