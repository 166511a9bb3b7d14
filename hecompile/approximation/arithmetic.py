"""Require of an operand only what homomorphic encryption has, so that one evaluation serves every kind of operand.

Operands are torch tensors, numpy arrays, graph values and counters of levels. Evaluations use sums, differences and products
of two operands or of an operand and a plain number.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar


class Operand(Protocol):
    """Require addition, subtraction and multiplication, elementwise."""

    def __add__(self, other: Any, /) -> Any: ...
    def __sub__(self, other: Any, /) -> Any: ...
    def __mul__(self, other: Any, /) -> Any: ...


T = TypeVar("T", bound=Operand)


def power(x: T, exponent: int) -> T:
    """Return x^exponent, exponent ≥ 1, in ⌈log2 exponent⌉ levels by products of halves."""
    if exponent == 1:
        return x
    larger = power(x, (exponent + 1) // 2)
    result: T = larger * (larger if exponent % 2 == 0 else power(x, exponent // 2))
    return result


def squared(x: T, times: int) -> T:
    """Return x^(2^times)."""
    for _ in range(times):
        x = x * x
    return x
