"""Compute the encrypted product on AVX512-VNNI in one pass: nothing between byte planes and reply bytes reaches memory.

The product is cut into tiles of a few tokens × 64 output features; `vnni_tile` has their formula and their instructions.

The layout is that of Goto and van de Geijn, "Anatomy of high-performance matrix multiplication" (2008), with one level:
a panel of 64 columns of the weight is packed by quads of input features so that it lies in the second-level cache, and
the planes stream past it. Packing reads either orientation of the weight, so one copy serves forward and backward, and
costs 1 / (2 · tokens) or so of the product.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from hecompile.runtime.worker.engines.vnni_tile import PANEL, TILE_TOKENS, write_tile

PACK_BLOCK = 64
"""Quads of one row that are packed before the next row: 64 · 64 quads lie in the first-level cache."""


def supported() -> bool:
    """Tell whether this machine has the instructions that the kernel is made of."""
    features = llvmlite.binding.get_host_cpu_features()
    return all(features.get(name, False) for name in ("avx512f", "avx512bw", "avx512vl", "avx512vnni"))


@intrinsic
def _fetch_add(typing_context: Any, address: Any, amount: Any) -> Any:
    """Add `amount` to the int64 at `address`, atomically, and return its value before: so threads share out the panels."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "monotonic")

    return types.int64(types.int64, types.int64), codegen


@njit(inline="always")
def _quad(a: int, b: int, c: int, d: int) -> np.uint32:
    return np.uint32(a) | np.uint32(b) << np.uint32(8) | np.uint32(c) << np.uint32(16) | np.uint32(d) << np.uint32(24)


@njit(nogil=True, cache=True)
def pack_panel(weight: np.ndarray, transposed: bool, first: int, valid: int, packed: np.ndarray) -> None:
    """Pack columns [first, first + valid) of the right-hand side by quads of input features, the last padded with zeros.

    weight: the bytes of int8 [in, out], or of [out, in] if `transposed`, as uint8. packed: uint32 [quads, 64]; columns
    from `valid` on are left as they are, as their products are never stored.
    """
    features = weight.shape[1] if transposed else weight.shape[0]
    full = features // 4
    if transposed:
        for block in range(0, full, PACK_BLOCK):
            for column in range(valid):
                row = weight[first + column]
                for quad in range(block, min(block + PACK_BLOCK, full)):
                    packed[quad, column] = _quad(row[4 * quad], row[4 * quad + 1], row[4 * quad + 2], row[4 * quad + 3])
    else:
        for quad in range(full):
            a, b = weight[4 * quad], weight[4 * quad + 1]
            c, d = weight[4 * quad + 2], weight[4 * quad + 3]
            for column in range(valid):
                n = first + column
                packed[quad, column] = _quad(a[n], b[n], c[n], d[n])
    if full < packed.shape[0]:
        for column in range(valid):
            value = np.uint32(0)
            for feature in range(4 * full, features):
                byte = weight[first + column, feature] if transposed else weight[feature, first + column]
                value |= np.uint32(byte) << np.uint32(8 * (feature - 4 * full))
            packed[full, column] = value


@cache
def product_kernel(limbs: int, digits: int) -> Any:
    """Return the compiled loop over panels, for words of `limbs` bytes and weights of `digits` ≤ limbs digits.

    Several threads may run it on one request: each calls it with the same `counter` and its own `packed`, and when the
    last of them returns the reply is whole. The interpreter lock is not held.
    """
    step = TILE_TOKENS[limbs]

    @njit(nogil=True, cache=True)
    def work(
        planes: np.ndarray,  # uint8 [limbs, T, 4 · quads], C order
        weights: tuple[np.ndarray, ...],  # uint8 [in, out], or [out, in] if transposed, one for each digit
        transposed: bool,
        block: int,  # tokens of one piece of work
        counter: np.ndarray,  # int64 [1], 0 at the start: the next piece
        packed: np.ndarray,  # uint32 [digits, quads, 64], aligned to a cache line, the thread's own
        reply: np.ndarray,  # uint8 [reply_bytes, T, out], C order
        reply_bits: int,  # of a word; the lowest bits of its bytes are 0
    ) -> None:
        _, tokens, features = planes.shape
        reply_bytes, _, columns = reply.shape
        dropped = 8 * limbs - reply_bits
        blocks = (tokens + block - 1) // block
        pieces = blocks * ((columns + PANEL - 1) // PANEL)
        panel = -1
        while True:
            piece: int = _fetch_add(counter.ctypes.data, 1)  # type: ignore[call-arg]
            if piece >= pieces:
                break
            first = piece // blocks * PANEL
            valid = min(PANEL, columns - first)
            if piece // blocks != panel:
                panel = piece // blocks
                for digit in range(digits):
                    pack_panel(weights[digit], transposed, first, valid, packed[digit])
            start = piece % blocks * block
            for token in range(start, min(start + block, tokens), step):
                write_tile(
                    limbs,
                    digits,
                    planes.ctypes.data,
                    token,
                    tokens,
                    features,
                    packed.ctypes.data,
                    packed.shape[1],
                    reply.ctypes.data + first,
                    reply_bytes,
                    dropped,
                    columns,
                    valid,
                )

    return work
