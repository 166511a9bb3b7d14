"""Compile the two loops of `word_bits`: they work on eight bytes at a time, by shifts and masks of 64-bit numbers."""

from __future__ import annotations

import numpy as np
from numba import njit

_BLOCK = 256
"""Numbers of each lane at a time, so that all lanes of a block lie in the first-level cache."""


@njit(inline="always")
def _shifted(source: int, low: int, to_high: int) -> int:
    """Shift by `low - to_high` bits, to the left where that is positive."""
    if low >= to_high:
        return source << np.uint64(low - to_high)  # type: ignore[return-value]
    return source >> np.uint64(to_high - low)  # type: ignore[return-value]


@njit(inline="always")
def _mask(low: int, bits: int) -> int:
    """Return eight bytes, each with ones at bits `low` to `low + bits - 1`, as far as a byte has those."""
    field = ((1 << bits) - 1 << (low + 8)) >> 8 & 255
    return np.uint64(field) * np.uint64(0x0101010101010101)  # type: ignore[return-value]


@njit(nogil=True, cache=True)
def pack_lanes(lanes: np.ndarray, bits: int, packed: np.ndarray) -> None:
    """Write the top `bits`, 1 to 7, of the bytes of uint64 `lanes [8, n]` to uint64 `packed [bits, n]`: see `word_bits`."""
    for start in range(0, lanes.shape[1], _BLOCK):
        stop = min(start + _BLOCK, lanes.shape[1])
        for row in range(bits):
            first = 8 * row // bits
            for lane in range(first, (8 * row + 7) // bits + 1):
                low = bits * lane - 8 * row  # where in the bytes of that row the bits of this lane begin; may be negative
                mask = _mask(low, bits)
                if lane == first:
                    for i in range(start, stop):
                        packed[row, i] = _shifted(lanes[lane, i], low, 8 - bits) & mask
                else:
                    for i in range(start, stop):
                        packed[row, i] |= _shifted(lanes[lane, i], low, 8 - bits) & mask


@njit(nogil=True, cache=True)
def unpack_lanes(packed: np.ndarray, bits: int, lanes: np.ndarray) -> None:
    """Invert `pack_lanes`; the lowest 8 - bits of every byte become 0."""
    for start in range(0, lanes.shape[1], _BLOCK):
        stop = min(start + _BLOCK, lanes.shape[1])
        for lane in range(8):
            first = bits * lane // 8
            for row in range(first, (bits * lane + bits - 1) // 8 + 1):
                low = bits * lane - 8 * row
                mask = _shifted(_mask(low, bits), 8 - bits, low)
                if row == first:
                    for i in range(start, stop):
                        lanes[lane, i] = _shifted(packed[row, i], 8 - bits, low) & mask
                else:
                    for i in range(start, stop):
                        lanes[lane, i] |= _shifted(packed[row, i], 8 - bits, low) & mask
