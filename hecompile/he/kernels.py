"""Compiled kernels: negacyclic products of eight features at a time, with what comes before and after fused in.

`ring.py` has the mathematics and the proof of exactness; here the same transform is arranged for speed. A polynomial of
degree < d folds to n = d/2 complex numbers modulo X^n - i (X^n = i identifies a_k + i·a_{k+n}). From there

    X^2h - c² = (X^h - c)(X^h + c)

splits it level by level, two levels at a time (radix 4), down to n values, with one root c per node of the tree: the twist
of `ring.py` is part of the roots. The order of the n values is that of the tree's leaves, which is all one needs for
products. (Bernstein, "Multidigit multiplication for mathematicians", 2001, sections 3 and 8; the tree of roots is the usual
form of negacyclic number-theoretic transforms, e.g. Seiler, ePrint 2018/039.)

Every array is flat and holds eight features side by side: complex values as `[n, 2, 8]` float64 or float32, coefficients as
`[d, 8]` int32. Kernels release the GIL and touch nothing but their arguments, so threads may run them on different groups of
features. Results do not depend on the machine or on the number of threads.
"""

# mypy: disallow-untyped-defs = False
from __future__ import annotations

from functools import lru_cache
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hecompile.he.simd import fma, fnma
from hecompile.he.vectors import LANES, address, broadcast, load_i32, load_real, real_address, store_real, to_real

_LINE = 64

compiled = numba.njit(nogil=True, cache=True, boundscheck=False, error_model="numpy")
inlined = numba.njit(forceinline=True, nogil=True, boundscheck=False, error_model="numpy")


def aligned(count: int, dtype: type[np.generic]) -> NDArray[Any]:
    """An uninitialized flat array that starts at a cache line: loads that straddle lines cost twice as much."""
    size = np.dtype(dtype).itemsize
    raw = np.empty(count * size + _LINE, dtype=np.uint8)
    start = -raw.ctypes.data % _LINE
    return raw[start : start + count * size].view(dtype)


def interleave(rows: NDArray[np.int32] | Tensor) -> NDArray[np.int32]:
    """int32 `[rows, n]` → flat `[groups, n, 8]`: eight rows side by side, the last group filled with rows of zeros."""
    source = torch.as_tensor(rows)
    groups, width = -(-len(source) // LANES), source.shape[1]
    result = aligned(groups * LANES * width, np.int32)
    shaped = torch.from_numpy(result).view(groups, width, LANES)
    whole = len(source) // LANES
    shaped[:whole] = source[: whole * LANES].view(whole, LANES, width).transpose(1, 2)
    if whole < groups:
        shaped[whole] = 0
        shaped[whole, :, : len(source) - whole * LANES] = source[whole * LANES :].t()
    return result


def deinterleave(words: NDArray[Any], rows: slice, width: int) -> NDArray[Any]:
    """Some rows of what `interleave` made, `[rows, width]`."""
    first, last = rows.start // LANES, -(-rows.stop // LANES)
    groups = words[first * LANES * width : last * LANES * width].reshape(last - first, width, LANES)
    flat = groups.transpose(0, 2, 1).reshape(-1, width)
    return np.ascontiguousarray(flat[rows.start - first * LANES : rows.stop - first * LANES])


def transform(
    words: NDArray[np.int32], ring_dim: int, result: NDArray[Any] | None = None, precision: type[np.floating] = np.float64
) -> NDArray[Any]:
    """Transforms interleaved polynomials: int32, flat `[polynomials, ring_dim, 8]` → real `[…, ring_dim/2, 2, 8]`.

    In the precision of `result`, or else in `precision`: float64 or float32.
    """
    values = aligned(words.size, precision) if result is None else result
    forward_many(words, words.size // (LANES * ring_dim), ring_dim // 2, roots(ring_dim, values.dtype.type), values)
    return values


def transform_secrets(secrets: NDArray[np.int8] | NDArray[np.int32]) -> NDArray[np.float64]:
    """int8 or int32 `[blocks, rank, ring_dim]` → float64, flat `[blocks, rank, ring_dim/2, 2]`, divided by ring_dim/2.

    The division, exact as that is a power of two, is the one that the inverse transform wants.
    """
    ring_dim = secrets.shape[-1]
    result = np.empty(secrets.size)
    words, values = aligned(LANES * ring_dim, np.int32), aligned(LANES * ring_dim, np.float64)
    _transform_rows(secrets.reshape(-1), ring_dim // 2, roots(ring_dim), words, values, result)
    return result


def roots(ring_dim: int, precision: type[np.floating] = np.float64) -> NDArray[Any]:
    """The roots of the tree for `ring_dim`, pass by pass from the top: float64 or float32, flat.

    A radix-4 node X^4h - e^(iθ) has six numbers: e^(iθ/4), e^(iθ/2) and their product. Where log2 n is odd the lowest
    level is radix 2, with e^(iθ/2) for each node.
    """
    return _roots(ring_dim, np.dtype(precision).name)


@lru_cache(maxsize=32)
def _roots(ring_dim: int, precision: str) -> NDArray[Any]:
    # An angle is a fraction of the full circle, an exact binary number: θ/2π = 1/4 at the top.
    turns, size, parts = np.array([0.25]), ring_dim // 2, []
    while size >= 4:
        parts.append(np.stack([_unit(turns / 4), _unit(turns / 2), _unit(turns * 0.75)], axis=1).ravel())
        turns = (turns[:, None] / 4 + np.array([0.0, 0.5, 0.25, 0.75])).ravel()
        size //= 4
    if size == 2:
        parts.append(_unit(turns / 2))
    flat = np.concatenate(parts).view(np.float64).astype(precision)
    flat.flags.writeable = False
    return flat


def _unit(turns: NDArray[np.float64]) -> NDArray[np.complex128]:
    """exp(2πi·turns), each within 2^-52: the angle is reduced to an eighth of the circle while it is still exact."""
    eighths = np.floor(turns * 8 + 0.5).astype(np.int64)  # nearest multiple of 1/8
    rest = (turns - eighths / 8) * (2 * np.pi)  # |rest| ≤ π/8
    value = np.cos(rest) + 1j * np.sin(rest)
    half = np.sqrt(0.5)
    turn = np.array(
        [1, complex(half, half), 1j, complex(-half, half), -1, complex(-half, -half), -1j, complex(half, -half)]
    )
    return value * turn[eighths % 8]


@inlined
def _times(re, im, w_re, w_im):
    """(re + i·im)(w_re + i·w_im)."""
    return fnma(im, w_im, re * w_re), fma(im, w_re, re * w_im)


@inlined
def _split4(work, at, step, roots, r, q0r, q0i, q1r, q1i, q2r, q2i, q3r, q3i):
    """The four quarters of a node of size 4h to its four grandchildren, stored `step` apart from `at` on."""
    q1r, q1i = _times(q1r, q1i, broadcast(roots, r), broadcast(roots, r + 1))
    q2r, q2i = _times(q2r, q2i, broadcast(roots, r + 2), broadcast(roots, r + 3))
    q3r, q3i = _times(q3r, q3i, broadcast(roots, r + 4), broadcast(roots, r + 5))
    ar, ai, br, bi = q0r + q2r, q0i + q2i, q1r + q3r, q1i + q3i
    cr, ci, dr, di = q0r - q2r, q0i - q2i, q1r - q3r, q1i - q3i
    store_real(work, at, ar + br)
    store_real(work, at + 8, ai + bi)
    store_real(work, at + step, ar - br)
    store_real(work, at + step + 8, ai - bi)
    store_real(work, at + 2 * step, cr - di)
    store_real(work, at + 2 * step + 8, ci + dr)
    store_real(work, at + 3 * step, cr + di)
    store_real(work, at + 3 * step + 8, ci - dr)


@compiled
def forward_many(coefficients, count, n, roots, values):
    """`count` polynomials, one after the other."""
    for i in range(count):
        forward_at(address(coefficients), 16 * n * i, n, real_address(roots), real_address(values), 16 * n * i)


@compiled
def _transform_rows(rows, n, roots, words, values, result):
    """Polynomials one after the other, divided by n: `transform` without a pass of its own for each change of order."""
    width = 2 * n
    for start in range(0, rows.size, LANES * width):
        lanes = min(LANES, (rows.size - start) // width)
        if lanes < LANES:
            words[:] = 0
        for lane in range(lanes):
            for k in range(width):
                words[LANES * k + lane] = rows[start + lane * width + k]
        forward_at(address(words), 0, n, address(roots), address(values), 0)
        for lane in range(lanes):
            for k in range(width):
                result[start + lane * width + k] = values[LANES * k + lane] / n


@inlined
def forward_at(coefficients, start, n, roots, work, at):
    """int32 `[d, 8]` at word `start` of `coefficients` → complex `[n, 2, 8]` at number `at` of `work`."""
    h = n // 4
    for p in range(h):
        c = start + 8 * p
        _split4(
            work, at + 16 * p, 16 * h, roots, 0,
            to_real(load_i32(coefficients, c), work), to_real(load_i32(coefficients, c + 8 * n), work),
            to_real(load_i32(coefficients, c + 8 * h), work), to_real(load_i32(coefficients, c + 8 * (h + n)), work),
            to_real(load_i32(coefficients, c + 16 * h), work), to_real(load_i32(coefficients, c + 8 * (2 * h + n)), work),
            to_real(load_i32(coefficients, c + 24 * h), work), to_real(load_i32(coefficients, c + 8 * (3 * h + n)), work),
        )  # fmt: skip
    r, nodes = 6, 4
    while h >= 4:
        h //= 4
        step = 16 * h
        for node in range(nodes):
            for p in range(h):
                a = at + 16 * (4 * h * node + p)
                _split4(
                    work, a, step, roots, r,
                    load_real(work, a), load_real(work, a + 8),
                    load_real(work, a + step), load_real(work, a + step + 8),
                    load_real(work, a + 2 * step), load_real(work, a + 2 * step + 8),
                    load_real(work, a + 3 * step), load_real(work, a + 3 * step + 8),
                )  # fmt: skip
            r += 6
        nodes *= 4
    if h == 2:
        for node in range(nodes):
            a = at + 32 * node
            ur, ui = load_real(work, a), load_real(work, a + 8)
            vr, vi = _times(
                load_real(work, a + 16), load_real(work, a + 24), broadcast(roots, r), broadcast(roots, r + 1)
            )
            store_real(work, a, ur + vr)
            store_real(work, a + 8, ui + vi)
            store_real(work, a + 16, ur - vr)
            store_real(work, a + 24, ui - vi)
            r += 2
