"""Transform polynomials of eight features at a time, in compiled kernels.

`ring.py` has the mathematics and the proof of exactness. Here the transform is arranged for speed. A polynomial of degree
< d folds to n = d/2 complex numbers modulo Y^n - ω (Y^n = ω identifies a_k + ω·a_{k+n}). From there, with X for Y,

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

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hecompile.errors import SecurityError
from hecompile.he.kernels.arguments import Ring, Strided
from hecompile.he.kernels.jit import compiled, inlined
from hecompile.he.kernels.radix4 import Quarters, load4, split4, store4, times
from hecompile.he.kernels.ring_shape import SMALLEST_RING_DIM, HasRing, trinomial
from hecompile.he.kernels.simd import fma
from hecompile.he.kernels.vectors import (
    LANES,
    address,
    broadcast,
    load_i32,
    load_real,
    real_address,
    store_real,
    to_real,
)

_LINE = 64


def aligned(count: int, dtype: type[np.generic]) -> NDArray[Any]:
    """Return an uninitialized flat array that starts at a cache line: loads that straddle lines cost twice as much."""
    size = np.dtype(dtype).itemsize
    raw = np.empty(count * size + _LINE, dtype=np.uint8)
    start = -raw.__array_interface__["data"][0] % _LINE  # four times as fast as raw.ctypes
    return raw[start : start + count * size].view(dtype)


def interleave(rows: NDArray[np.int32] | Tensor) -> NDArray[np.int32]:
    """Lay eight rows side by side: int32 `[rows, n]` → flat `[groups, n, 8]`, the last group filled with rows of zeros."""
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
    """Return some rows of what `interleave` made: `[rows, width]`, a copy."""
    first, last = rows.start // LANES, -(-rows.stop // LANES)
    groups = words[first * LANES * width : last * LANES * width].reshape(last - first, width, LANES)
    flat = groups.transpose(0, 2, 1).reshape(-1, width)
    return np.ascontiguousarray(flat[rows.start - first * LANES : rows.stop - first * LANES])


def transform(
    words: NDArray[np.int32], params: HasRing, result: NDArray[Any] | None = None, precision: type[np.floating] = np.float64
) -> NDArray[Any]:
    """Transform interleaved polynomials: int32, flat `[polynomials, ring_dim, 8]` → real `[…, ring_dim/2, 2, 8]`.

    The precision is that of `result`, which is filled and returned, or else `precision`: float64 or float32.
    """
    values = aligned(words.size, precision) if result is None else result
    n = params.ring_dim // 2
    forward_many(words, words.size // (2 * LANES * n), n, roots(params, values.dtype.type), values)
    return values


def transform_secrets(secrets: NDArray[np.int8] | NDArray[np.int32], params: HasRing) -> NDArray[np.float64]:
    """Transform secrets: int8 or int32 `[blocks, rank, ring_dim]` → float64, flat `[blocks, rank, n, 2]`, divided by n.

    The division by n = ring_dim/2 is the one that the inverse transform wants. It is exact, as n is a power of two.
    """
    n = params.ring_dim // 2
    result = np.empty(secrets.size)
    words, values = aligned(2 * LANES * n, np.int32), aligned(2 * LANES * n, np.float64)
    _transform_rows(secrets.reshape(-1), n, roots(params), words, values, result)
    return result


def extend_secrets(values: NDArray[np.float64], params: HasRing) -> NDArray[np.float64]:
    """Extend transformed secrets for a packed ring: float64, flat `[blocks, rank, n, 2]` → `[blocks, 2·rank - 1, n, 2]`.

    `values` comes from `transform_secrets`. The result is Y·s_1, …, Y·s_{m-1}, s_0, …, s_{m-1}, of which m one after the
    other are a row of the matrix of multiplication by s.
    """
    n = params.ring_dim // 2
    secrets = values.view(np.complex128).reshape(-1, params.rank, n)
    shifted = secrets[:, 1:] * _points(params.ring_dim, trinomial(params))
    return np.concatenate([shifted, secrets], axis=1).reshape(-1).view(np.float64)


FOLD = 4
"""Numbers before the first root of `roots`."""


def roots(params: HasRing, precision: type[np.floating] = np.float64) -> NDArray[Any]:
    """Return the constants of folding, and the roots of the tree, pass by pass from the top: float64 or float32, flat.

    The constants are the real and imaginary part of ω, 1/Im ω and Re ω/Im ω: from z = a + ωb come b = Im z/Im ω and
    a = Re z - Re ω·b. A radix-4 node X^4h - e^(iθ) has six numbers: e^(iθ/4), e^(iθ/2) and their product. Where log2 n is
    odd, the lowest level is radix 2, with e^(iθ/2) for each node.
    """
    return _roots(params.ring_dim, trinomial(params), precision.__name__)


def ring_of(params: HasRing, precision: type[np.floating] = np.float64) -> Ring:
    """Describe a ring to the kernels that compute in that precision."""
    return _ring(params.ring_dim, params.rank, params.packing, trinomial(params), precision.__name__)


@lru_cache(maxsize=32)
def _ring(ring_dim: int, rank: int, packing: int, of_trinomial: bool, precision: str) -> Ring:
    constants = _roots(ring_dim, of_trinomial, precision)
    return Ring(ring_dim // 2, rank, packing, constants, constants.size)


@lru_cache(maxsize=32)
def _roots(ring_dim: int, of_trinomial: bool, precision: str) -> NDArray[Any]:
    if ring_dim < SMALLEST_RING_DIM:  # every kernel wants roots; with fewer points they would leave masks unwritten
        raise SecurityError(f"the kernels are for ring_dim {SMALLEST_RING_DIM} or more, not {ring_dim}: take a larger ring")
    omega = complex(0.5, math.sqrt(0.75)) if of_trinomial else 1j
    parts = [np.array([omega, complex(1 / omega.imag, omega.real / omega.imag)])]
    size, thirds = ring_dim // 2, _TOP[of_trinomial]
    while size >= 4:
        parts.append(np.stack([_unit(thirds / 4), _unit(thirds / 2), _unit(thirds * 0.75)], axis=1).ravel())
        thirds = _split_turns(thirds)
        size //= 4
    if size == 2:
        parts.append(_unit(thirds / 2))
    flat = np.concatenate(parts).view(np.float64).astype(precision)
    flat.flags.writeable = False
    return flat


@lru_cache(maxsize=16)
def _points(ring_dim: int, of_trinomial: bool) -> NDArray[np.complex128]:
    """Return the value of Y at each of the n points, in the order of the leaves."""
    size, thirds = ring_dim // 2, _TOP[of_trinomial]
    while size >= 4:
        thirds = _split_turns(thirds)
        size //= 4
    if size == 2:
        thirds = (thirds[:, None] / 2 + np.array([0.0, 1.5])).ravel()
    return _unit(thirds)


# An angle is three times a fraction of the full circle, an exact binary number: that of ω at the top, 1/4 or 1/6.
_TOP = {False: np.array([0.75]), True: np.array([0.5])}


def _split_turns(thirds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the angles of the four grandchildren of each node."""
    return (thirds[:, None] / 4 + np.array([0.0, 1.5, 0.75, 2.25])).ravel()


def _unit(thirds: NDArray[np.float64]) -> NDArray[np.complex128]:
    """Return exp(2πi·thirds/3), each within 2^-52: the angle is reduced to an eighth of the circle while still exact."""
    eighths = np.floor(thirds * 8 / 3 + 0.5).astype(np.int64)  # nearest multiple of 1/8
    rest = (thirds - eighths * 0.375) * (2 * np.pi / 3)  # |rest| ≤ π/8
    value = np.cos(rest) + 1j * np.sin(rest)
    half = np.sqrt(0.5)
    turn = np.array(
        [1, complex(half, half), 1j, complex(-half, half), -1, complex(-half, -half), -1j, complex(half, -half)]
    )
    return value * turn[eighths % 8]


@compiled
def forward_many(coefficients, count, n, roots, values):
    """Transform `count` interleaved polynomials, one after the other."""
    for i in range(count):
        forward_at(address(coefficients), 16 * n * i, n, real_address(roots), real_address(values), 16 * n * i)


@compiled
def _transform_rows(rows, n, roots, words, values, result):
    """Transform polynomials that lie one after the other and divide by n, with no pass for each change of order."""
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
def _fold(coefficients, low, high, real, imaginary, work):
    """Return a + ω·b for the coefficients a and b at words `low` and `high`, in the precision of `work`."""
    b = to_real(load_i32(coefficients, high), work)
    return fma(b, real, to_real(load_i32(coefficients, low), work)), b * imaginary


@inlined
def forward_at(coefficients, start, n, roots, work, at):
    """Transform int32 `[d, 8]` at word `start` of `coefficients` to complex `[n, 2, 8]` at number `at` of `work`."""
    h = n // 4
    real, imaginary = broadcast(roots, 0), broadcast(roots, 1)
    for p in range(h):
        c = start + 8 * p
        q0r, q0i = _fold(coefficients, c, c + 8 * n, real, imaginary, work)
        q1r, q1i = _fold(coefficients, c + 8 * h, c + 8 * (h + n), real, imaginary, work)
        q2r, q2i = _fold(coefficients, c + 16 * h, c + 8 * (2 * h + n), real, imaginary, work)
        q3r, q3i = _fold(coefficients, c + 24 * h, c + 8 * (3 * h + n), real, imaginary, work)
        quarters = Quarters(q0r, q0i, q1r, q1i, q2r, q2i, q3r, q3i)
        store4(Strided(work, at + 16 * p, 16 * h), split4(roots, FOLD, quarters))
    r, nodes = FOLD + 6, 4
    while h >= 4:
        h //= 4
        step = 16 * h
        for node in range(nodes):
            for p in range(h):
                place = Strided(work, at + 16 * (4 * h * node + p), step)
                store4(place, split4(roots, r, load4(place)))
            r += 6
        nodes *= 4
    if h == 2:
        for node in range(nodes):
            a = at + 32 * node
            ur, ui = load_real(work, a), load_real(work, a + 8)
            vr, vi = times(
                load_real(work, a + 16), load_real(work, a + 24), broadcast(roots, r), broadcast(roots, r + 1)
            )
            store_real(work, a, ur + vr)
            store_real(work, a + 8, ui + vi)
            store_real(work, a + 16, ur - vr)
            store_real(work, a + 24, ui - vi)
            r += 2
