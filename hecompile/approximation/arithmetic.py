"""What an evaluation needs of its operand, so that one text serves torch tensors, numpy arrays, graph values and counters.

Only sums, differences and products with each other or with a plain number are used: what homomorphic encryption has.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar


class Operand(Protocol):
    """Anything that adds, subtracts and multiplies, elementwise."""

    def __add__(self, other: Any, /) -> Any: ...
    def __sub__(self, other: Any, /) -> Any: ...
    def __mul__(self, other: Any, /) -> Any: ...


T = TypeVar("T", bound=Operand)


def power(x: T, exponent: int) -> T:
    """x^exponent for exponent ≥ 1 in ⌈log2 exponent⌉ levels: repeated squaring, the halves multiplied."""
    if exponent == 1:
        return x
    larger = power(x, (exponent + 1) // 2)
    result: T = larger * (larger if exponent % 2 == 0 else power(x, exponent // 2))
    return result


def squared(x: T, times: int) -> T:
    """x^(2^times)."""
    for _ in range(times):
        x = x * x
    return x
