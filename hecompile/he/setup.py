"""Setup: the hint H = W·A mod 2^32, exactly, as integer matrix products of bytes where the machine does them right."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from hecompile.errors import InputError
from hecompile.he.public_matrix import PublicMatrix
from hecompile.integers import balanced_bytes

_MAX_FEATURES = 2**15
_CHUNK_IN, _CHUNK_OUT = 1024, 4096
"""Rows of A expanded, and rows of H made, at a time: bounds the memory, which a vocabulary's W would not."""


def setup(weight: Tensor, public: PublicMatrix) -> Tensor:
    """The hint of a circuit: H = W·A mod q.

    Args:
        weight: int8 or int16 `[out, in]`, with in ≤ 32768 and in ≤ public.rows.
        public: the matrix A.

    Returns:
        int32 `[out, rank · ring_dim]`, centred.

    Raises:
        InputError: the weight is not an int8 or int16 matrix, or A has too few rows.
    """
    if weight.dtype not in (torch.int8, torch.int16) or weight.dim() != 2 or 0 in weight.shape:
        raise InputError(f"a weight is int8 or int16 [out, in], got {weight.dtype} {list(weight.shape)}")
    if weight.shape[1] > min(public.rows, _MAX_FEATURES):
        raise InputError(
            f"a weight with {weight.shape[1]} inputs needs as many rows of A, which has {public.rows} "
            f"(and at most {_MAX_FEATURES} are supported)"
        )
    product = multiply_by_limbs if limb_product_is_exact() else multiply_in_float64
    digits = [torch.from_numpy(digit) for digit in balanced_bytes(weight.numpy())]
    hint = torch.zeros((weight.shape[0], public.params.lattice_dim), dtype=torch.int32)
    for start in range(0, weight.shape[1], _CHUNK_IN):
        rows = slice(start, min(start + _CHUNK_IN, weight.shape[1]))
        matrix = public.coefficients(rows).flatten(1)  # int32 [rows, rank · ring_dim]
        for place, digit in enumerate(digits):
            for part, target in zip(digit[:, rows].split(_CHUNK_OUT), hint.split(_CHUNK_OUT), strict=True):
                target += product(part.contiguous(), matrix) << (8 * place)  # wraps mod 2^32
    return hint


def multiply_in_float64(weight: Tensor, matrix: Tensor) -> Tensor:
    """W·M mod 2^32 for int8 `[out, in]` and int32 `[in, n]`: int32 `[out, n]`, exact for in ≤ 32768 on any machine.

    Every partial sum, in any order, is an integer of at most 128 · 2^31 · in ≤ 2^53, which float64 holds exactly.
    """
    return (weight.double() @ matrix.double()).to(torch.int64).to(torch.int32)


def multiply_by_limbs(weight: Tensor, matrix: Tensor) -> Tensor:
    """The same as four int8 products, one per balanced base-256 digit of M; 2.5 times as fast with AVX512-VNNI.

    M = Σ_l 2^(8l) · M_l with digits M_l in [-128, 127]: adding 0x80808080 carries as balanced digits need, and the
    exclusive or takes the 0x80 away from each byte. The top carry is a multiple of 2^32. A 32-bit sum is at most
    128 · 128 · in ≤ 2^29, so nothing overflows before the shifts, which wrap mod 2^32 as wanted.
    """
    offset = torch.tensor(0x80808080 - 2**32, dtype=torch.int32)
    digits = ((matrix + offset) ^ offset).contiguous().view(torch.int8).view(*matrix.shape, 4)  # [in, n, 4]
    total = torch.zeros((weight.shape[0], matrix.shape[1]), dtype=torch.int32)
    for limb in range(4):
        total += torch._int_mm(weight, digits[..., limb].contiguous()) << (8 * limb)
    return total


@cache
def limb_product_is_exact() -> bool:
    """Whether int8 products are exact here: some x86 kernels without VNNI saturate when two products are added."""
    weight = torch.tensor([[-128] * 64, [127] * 64, [-128, 127] * 32, [-127, -128] * 32], dtype=torch.int8)
    extremes = torch.tensor([-(2**31), 2**31 - 1, 0x7F7F7F7F, 0x80808080 - 2**32, -1, 0], dtype=torch.int32)
    matrix = extremes.repeat(64, 4)[:, :16].contiguous()
    matrix[1::2] = matrix[1::2].flip(1)
    try:
        return torch.equal(multiply_by_limbs(weight, matrix), multiply_in_float64(weight, matrix))
    except RuntimeError:  # this build of torch has no int8 product
        return False
