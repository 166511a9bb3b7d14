"""Describe the shape of a ring: its dimension, its modulus, the smallest that the kernels take."""

from __future__ import annotations

from typing import Protocol

SMALLEST_RING_DIM = 16
"""Smallest ring_dim of the kernels: the pass that joins four quarters of ring_dim / 2 points must not be the only one."""


class HasRing(Protocol):
    """Stand for anything with a ring: `RingParameters` here, which the ring arithmetic need not know."""

    @property
    def ring_dim(self) -> int: ...
    @property
    def rank(self) -> int: ...
    @property
    def packed(self) -> bool: ...
    @property
    def packing(self) -> int: ...


def trinomial(params: HasRing) -> bool:
    """Return whether the modulus is Y^d - Y^(d/2) + 1, as in packed rings of a rank divisible by 3, and not Y^d + 1."""
    return params.packed and params.rank % 3 == 0
