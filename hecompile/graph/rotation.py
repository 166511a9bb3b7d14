"""Rotate vectors by a fixed public orthogonal matrix, fast: what is large in few entries becomes even over all of them.

    x·Rᵀ,   R = (D ⊗ H)·diag(s),   n = odd · 2^k

D is the orthonormal DCT-II of the odd part, H the Hadamard matrix of 2^k over 2^(k/2). s is the Rudin-Shapiro sequence,
whose Walsh spectrum is flat: without it a constant vector would end in one entry. To rotate the inputs of a product before
they are made integers is incoherence processing (Chee et al., QuIP, arXiv 2307.13304; with Hadamard matrices, Ashkboos et
al., QuaRot, arXiv 2404.00456). A row takes O(n·(log n + odd)) operations.
"""

# mypy: disallow-untyped-decorators = False
from __future__ import annotations

import math
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_Array = NDArray[np.floating[Any]]


def rotate(x: Tensor) -> Tensor:
    """Return x·Rᵀ for float32 or float64 x [..., n]; differentiable, and it keeps no activation for the gradient.

    The result of a row does not depend on the rows beside it, to the last bit.
    """
    rotated: Tensor = _Rotation.apply(x)
    return rotated


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _apply(x, transposed=False)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Tensor:
        return _apply(gradients[0], transposed=True)


def _apply(x: Tensor, transposed: bool) -> Tensor:
    """Multiply the rows of x [..., n] by Rᵀ, or by R where `transposed`."""
    rows = x.detach().reshape(-1, x.shape[-1]).numpy()  # [T, n]
    out = np.empty_like(rows, order="C")
    signs, cosines = _signs(rows.shape[1]).astype(rows.dtype), _cosines(rows.shape[1]).astype(rows.dtype)
    (_turn_back if transposed else _turn)(np.ascontiguousarray(rows), signs, cosines, out)
    return torch.from_numpy(out).view(x.shape)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _turn(rows: _Array, signs: _Array, cosines: _Array, out: _Array) -> None:
    odd, power = len(cosines), rows.shape[1] // len(cosines)
    signed = np.empty_like(rows[0])
    for row in range(len(rows)):
        own = out[row]
        if odd == 1:
            for i in range(len(signs)):
                own[i] = rows[row, i] * signs[i]
        else:
            for i in range(len(signs)):
                signed[i] = rows[row, i] * signs[i]
            _mix(signed, cosines, own)
        for part in range(odd):
            _hadamard(own[part * power : (part + 1) * power])


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _turn_back(rows: _Array, signs: _Array, cosines: _Array, out: _Array) -> None:
    odd, power = len(cosines), rows.shape[1] // len(cosines)
    mixed, back = np.empty_like(rows[0]), np.ascontiguousarray(cosines.T)
    for row in range(len(rows)):
        own = out[row]
        own[:] = rows[row]
        for part in range(odd):
            _hadamard(own[part * power : (part + 1) * power])
        if odd > 1:
            _mix(own, back, mixed)
            own[:] = mixed
        for i in range(len(signs)):
            own[i] *= signs[i]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _mix(x: _Array, matrix: _Array, out: _Array) -> None:
    """Multiply x, as [odd, power], by a matrix [odd, odd] from the left."""
    odd, power = len(matrix), len(x) // len(matrix)
    out[:] = 0
    for i in range(odd):
        for j in range(odd):
            factor = matrix[i, j]
            for k in range(power):
                out[i * power + k] += factor * x[j * power + k]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _hadamard(x: _Array) -> None:
    """Multiply x [2^k] by the orthonormal Hadamard matrix, in place: two of its k stages in one pass over memory.

    Strides fall from half of x to 1, so that all passes but the last two are over neighbours, as a vector instruction wants.
    """
    size = len(x)
    stages = 0
    while 1 << stages < size:
        stages += 1
    step = size
    if stages % 2:
        step = size // 2
        for i in range(step):
            a, b = x[i], x[step + i]
            x[i], x[step + i] = a + b, a - b
    while step > 16:
        h = step // 4
        for start in range(0, size, step):
            end = start + step
            _two_stages(x[start : end - 3 * h], x[start + h : end - 2 * h], x[start + 2 * h : end - h], x[end - h : end])
        step = h
    if step == 16:  # of known lengths, which the compiler unrolls
        for i in range(0, size, 16):
            for j in range(i, i + 4):
                a, b, c, d = x[j], x[j + 4], x[j + 8], x[j + 12]
                s, t, u, v = a + c, b + d, a - c, b - d
                x[j], x[j + 4], x[j + 8], x[j + 12] = s + t, s - t, u + v, u - v
        step = 4
    norm = 1 / math.sqrt(size)
    if step == 4:
        for i in range(0, size, 4):
            a, b, c, d = x[i], x[i + 1], x[i + 2], x[i + 3]
            s, t, u, v = a + c, b + d, a - c, b - d
            x[i], x[i + 1], x[i + 2], x[i + 3] = (s + t) * norm, (s - t) * norm, (u + v) * norm, (u - v) * norm
    else:
        for i in range(size):
            x[i] *= norm


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _two_stages(a: _Array, b: _Array, c: _Array, d: _Array) -> None:
    """Take two stages over four quarters of the same length: a ± c and b ± d, then neighbours of these."""
    for i in range(len(a)):
        s, t, u, v = a[i] + c[i], b[i] + d[i], a[i] - c[i], b[i] - d[i]
        a[i], b[i], c[i], d[i] = s + t, s - t, u + v, u - v


@cache
def _signs(size: int) -> _Array:
    """Return the Rudin-Shapiro sequence, f64 [size]: -1 where the index has an odd number of adjacent ones in binary."""
    return np.array([1.0 - 2.0 * ((i & (i >> 1)).bit_count() & 1) for i in range(size)])


@cache
def _cosines(size: int) -> _Array:
    """Return the orthonormal DCT-II of the odd part of `size`, f64 (Ahmed et al., IEEE Trans. Computers C-23, 1974)."""
    odd = size // (size & -size)
    index = np.arange(odd)
    matrix = np.cos(math.pi * (index + 0.5) * index[:, None] / odd) * math.sqrt(2 / odd)
    matrix[0] /= math.sqrt(2)
    return matrix
