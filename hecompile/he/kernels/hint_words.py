"""Pack the words of hints in 16 to 31 bits each, and unpack them ahead of their transform.

Eight words that stand side by side (`transform.interleave`) are a line; at b bits they take b bytes. With b = 8·m + f, where
m is 2 or 3 and f < 8, a group of `lines` lines is three planes one after the other,

    the top 16 bits                          uint16 [lines, 8]
    the 8 bits below, where m is 3           uint8 [lines, 8]
    the last f bits of eight words           f bytes a line, the first word lowest

so that a vector of words is two loads, one of 64 bits for all lanes, and shifts by constants.
"""

# mypy: disallow-untyped-defs = False
from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hecompile.he.kernels.jit import compiled, inlined
from hecompile.he.kernels.transform import aligned
from hecompile.he.kernels.vectors import (
    LANES,
    address,
    load_low_bits,
    load_middle_bytes,
    load_top_halves,
    store_i32,
)

WORD_BITS = 32


@inlined
def unpack_group(packed, start, lines, bits, words, at):
    """Unpack the group at byte `start` of the address `packed` to int32 `[lines, 8]` at word `at` of the address `words`."""
    rest, middle, place = bits % 8, packed + start + 16 * lines, 32 - bits
    top, low = packed + start, packed + start + 8 * (bits // 8) * lines
    if bits < 24 and rest == 0:
        for k in range(lines):
            store_i32(words, at + 8 * k, load_top_halves(top, 8 * k))
    elif bits < 24:
        for k in range(lines):
            store_i32(words, at + 8 * k, load_top_halves(top, 8 * k) + load_low_bits(low, rest * (k + 1), rest, place))
    elif rest == 0:
        for k in range(lines):
            store_i32(words, at + 8 * k, load_top_halves(top, 8 * k) + load_middle_bytes(middle, 8 * k))
    else:
        for k in range(lines):
            word = load_top_halves(top, 8 * k) + load_middle_bytes(middle, 8 * k)
            store_i32(words, at + 8 * k, word + load_low_bits(low, rest * (k + 1), rest, place))


def round_words(words: NDArray[np.int32], bits: int) -> NDArray[np.int32]:
    """Round words mod 2^32 to multiples of 2^(32 - bits), ties up; returns a copy."""
    step = 1 << (WORD_BITS - bits)
    rounded: NDArray[np.int32] = (words + np.int32(step // 2)) & np.int32(-step)  # wraps mod 2^32
    return rounded


def pack_words(words: NDArray[np.int32], lines: int, bits: int) -> NDArray[np.uint8]:
    """Round interleaved words to `bits` bits, 16 to 31, and pack them: flat int32 `[groups, lines, 8]` → uint8
    `[groups, bits, lines]`."""
    groups = words.size // (LANES * lines)
    packed: NDArray[np.uint8] = np.zeros((groups, bits, lines), dtype=np.uint8)
    _pack(np.ascontiguousarray(words).reshape(-1), groups, lines, bits, packed.reshape(-1))
    return packed


def unpack_words(packed: NDArray[np.uint8], lines: int, bits: int) -> NDArray[np.int32]:
    """Unpack what `pack_words` makes: flat uint8 `[groups, bits, lines]` → flat int32 `[groups, lines, 8]`."""
    groups = packed.size // (bits * lines)
    words: NDArray[np.int32] = aligned(groups * LANES * lines, np.int32)
    _unpack(packed, groups, lines, bits, words)
    return words


@compiled
def _unpack(packed, groups, lines, bits, words):
    for group in range(groups):
        unpack_group(address(packed), group * bits * lines, lines, bits, address(words), group * 8 * lines)


@compiled
def _pack(words, groups, lines, bits, packed):
    rest, whole = bits % 8, bits // 8
    half = np.int64(1) << (31 - bits)
    for group in range(groups):
        top = group * bits * lines
        middle, low = top + 16 * lines, top + 8 * whole * lines
        for k in range(lines):
            together = np.uint64(0)
            for lane in range(8):
                # The sign bits above the 32 of a word are cut off by what is kept of it.
                word = np.int64(words[(group * lines + k) * 8 + lane]) + half
                packed[top + 16 * k + 2 * lane] = (word >> 16) & 255
                packed[top + 16 * k + 2 * lane + 1] = (word >> 24) & 255
                if whole == 3:
                    packed[middle + 8 * k + lane] = (word >> 8) & 255
                kept = (word >> (32 - bits)) & ((np.int64(1) << rest) - 1)
                together |= np.uint64(kept) << np.uint64(rest * lane)
            for index in range(rest):
                packed[low + rest * k + index] = np.uint8((together >> np.uint64(8 * index)) & np.uint64(255))
