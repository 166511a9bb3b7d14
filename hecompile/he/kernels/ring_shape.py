"""Say of which shape a ring is: its dimension, its modulus, the smallest that the kernels take."""

from __future__ import annotations

from typing import Protocol

SMALLEST_RING_DIM = 16
"""Of the compiled kernels: the pass that joins four quarters of ring_dim / 2 points is the last and not the only one."""


class HasRing(Protocol):
    """Anything with a ring: `RingParameters` here, but the ring arithmetic need not know it."""

    @property
    def ring_dim(self) -> int: ...
    @property
    def rank(self) -> int: ...
    @property
    def packed(self) -> bool: ...
    @property
    def packing(self) -> int: ...


def trinomial(params: HasRing) -> bool:
    """Whether the modulus is Y^d - Y^(d/2) + 1, which packed rings of a rank divisible by 3 have, and not Y^d + 1."""
    return params.packed and params.rank % 3 == 0
