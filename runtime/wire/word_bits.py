"""Pack byte planes into the bits that words have, for the wire, and back.

Words of B bits are the highest of L = ⌈B/8⌉ bytes, so of the lowest plane only the top k = B - 8·(L - 1) bits count. A
message has the other planes as they are, and after them k bits of each of the n bytes of the lowest plane. Where 8 divides B
it has all planes as they are.

    lane s       bytes s·m to s·m + m - 1 of the plane, 0 ≤ s < 8, where m = 8·⌈n/64⌉; there are zeros after the last byte
    column i     the top k bits of byte i of lane 0, then of lane 1, and so on, from the lowest bit up: k bytes
    packed       the first bytes of all columns, then the second bytes, and so on: k·m bytes

So eight bytes of a lane are one 64-bit number, and each number of the message is made of a few of those by shifts and masks
(`bit_kernels`). Every message is that of some planes: bits of bytes beyond the last are not looked at.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import numpy as np

from hecompile.word_sizes import bytes_of, unused_bits

_LANES = 8


def pack(planes: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the bytes of a message: those of whole planes, which share memory where they can, and the packed bits.

    Args:
        planes: uint8 [L, T, features], lowest first.
        bits: B, of a word; what the lowest plane has below them is left out.
    """
    if not unused_bits(bits):
        return np.ascontiguousarray(planes).reshape(-1), np.empty(0, dtype=np.uint8)
    kept = 8 - unused_bits(bits)
    lanes = _numbers(planes[0].reshape(-1), _LANES * _lane_numbers(planes[0].size)).reshape(_LANES, -1)
    packed = np.empty((kept, lanes.shape[1]), dtype=np.uint64)
    _kernels().pack_lanes(lanes, kept, packed)
    return np.ascontiguousarray(planes[1:]).reshape(-1), packed.view(np.uint8).reshape(-1)


def unpack(whole: np.ndarray, packed: np.ndarray, bits: int, shape: tuple[int, int]) -> np.ndarray:
    """Invert `pack`: uint8 [n], the bytes of whole planes, and uint8 [m], the packed bits → uint8 [L, *shape].

    The caller has checked their sizes (`whole_bytes`, `hecompile.integers.wire_bytes`). Where 8 divides `bits` the result
    shares the memory of `whole`.
    """
    limbs, values = bytes_of(bits), shape[0] * shape[1]
    if not unused_bits(bits):
        return whole.reshape(limbs, *shape)
    kept, count = 8 - unused_bits(bits), _lane_numbers(values)
    planes = np.empty((limbs, values), dtype=np.uint8)
    planes[1:] = whole.reshape(limbs - 1, values)
    fits = values == 8 * _LANES * count
    lanes = planes[0].view(np.uint64) if fits else np.empty(_LANES * count, dtype=np.uint64)
    _kernels().unpack_lanes(_numbers(packed, count * kept).reshape(kept, count), kept, lanes.reshape(_LANES, count))
    if not fits:
        planes[0] = lanes.view(np.uint8)[:values]
    return planes.reshape(limbs, *shape)


def whole_bytes(bits: int, values: int) -> int:
    """Return how many bytes of a message of so many words are whole planes."""
    return bits // 8 * values


def _lane_numbers(values: int) -> int:
    """Return how many 64-bit numbers each lane has of a plane of so many bytes: m/8."""
    return -(-values // (8 * _LANES))


def _numbers(data: np.ndarray, count: int) -> np.ndarray:
    """Return uint8 `data [n]` as read-only uint64 [count], in memory of its own where it is too short or not aligned.

    numba compiles for each kind of array, and one is enough.
    """
    if data.size == 8 * count and data.ctypes.data % 8 == 0 and data.flags.c_contiguous:
        view = data.view(np.uint64)
    else:
        view = np.zeros(count, dtype=np.uint64)
        view.view(np.uint8)[: data.size] = data
    view.flags.writeable = False
    return view


@cache
def _kernels() -> ModuleType:
    """Import the compiled loops when a message first has packed bits: most of their time is numba's."""
    from hecompile.runtime.wire import bit_kernels

    return bit_kernels
