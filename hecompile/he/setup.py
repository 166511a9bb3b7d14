"""Make the hint H = W·A mod 2^32 exactly, by products of bytes where the machine computes them right and fast.

Hints cost what `rank · ring_dim` tokens cost on the worker, forward and backward, through every frozen linear. So A and its
digits, which the circuits of a model share, are made once (`PreparedMatrix`), and nothing between the products allocates.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from hecompile.errors import InputError
from hecompile.he.public_matrix import PublicMatrix
from hecompile.integers import balanced_bytes, int8_products_are_fast

_MAX_FEATURES = 2**15
_LIMBS = 4
_CHUNK_IN, _CHUNK_OUT = 1024, 2048
"""Rows of A expanded, and rows of H made, at a time. The first bounds the memory for digits and float64 copies; the second
is large enough that a product does not spend its time on packing A, and keeps the int32 products near the cache."""


class PreparedMatrix:
    """Prepare A for the setup of many circuits: the balanced base-256 digits of its rows, expanded at first use and kept.

    It takes 4 · rank · ring_dim bytes per row that was used: 100 MB for 16384 rows at lattice dimension 1536. Not for
    several threads at once: the products inside use every core.
    """

    def __init__(self, public: PublicMatrix) -> None:
        self.public = public
        self._lattice_dim = public.params.lattice_dim
        self._expanded = 0
        # Never touched rows cost no memory: the operating system maps a page at its first write.
        self._limbs = torch.empty((_LIMBS, public.rows, self._lattice_dim), dtype=torch.int8)
        self._product = torch.empty((_CHUNK_OUT, self._lattice_dim), dtype=torch.int32)

    def setup(self, weight: Tensor) -> Tensor:
        """Return the hint of a circuit: H = W·A mod q.

        Args:
            weight: int8 or int16 `[out, in]`, with in ≤ 32768 and in ≤ public.rows.

        Returns:
            int32 `[out, rank · ring_dim]`, centred.

        Raises:
            InputError: the weight is not an int8 or int16 matrix, or A has too few rows.
        """
        if weight.dtype not in (torch.int8, torch.int16) or weight.dim() != 2 or 0 in weight.shape:
            raise InputError(f"a weight is int8 or int16 [out, in], got {weight.dtype} {list(weight.shape)}")
        if weight.shape[1] > min(self.public.rows, _MAX_FEATURES):
            raise InputError(
                f"a weight with {weight.shape[1]} inputs needs as many rows of A, which has {self.public.rows} "
                f"(and at most {_MAX_FEATURES} are supported)"
            )
        digits = [torch.from_numpy(digit) for digit in balanced_bytes(weight.numpy())]
        hint = torch.zeros((weight.shape[0], self._lattice_dim), dtype=torch.int32)
        if int8_products_are_fast() and limb_product_is_exact():
            self._add_limb_products(digits, hint)
        else:
            self._add_float_products(digits, hint)
        return hint

    def _add_limb_products(self, digits: list[Tensor], hint: Tensor) -> None:
        inputs = digits[0].shape[1]
        self._expand_to(inputs)
        for place, digit in enumerate(digits):
            for part, target in zip(digit.split(_CHUNK_OUT), hint.split(_CHUNK_OUT), strict=True):
                add_limb_products(part, self._limbs[:, :inputs], target, place, self._product[: len(part)])

    def _add_float_products(self, digits: list[Tensor], hint: Tensor) -> None:
        for start in range(0, digits[0].shape[1], _CHUNK_IN):
            rows = slice(start, min(start + _CHUNK_IN, digits[0].shape[1]))
            matrix = self.public.coefficients(rows).flatten(1)  # int32 [rows, rank · ring_dim]
            for place, digit in enumerate(digits):
                for part, target in zip(digit[:, rows].split(_CHUNK_OUT), hint.split(_CHUNK_OUT), strict=True):
                    target += multiply_in_float64(part, matrix) << (8 * place)  # wraps mod 2^32

    def _expand_to(self, stop: int) -> None:
        while self._expanded < stop:
            rows = slice(self._expanded, min(self._expanded + _CHUNK_IN, stop))
            self._limbs[:, rows] = balanced_limbs(self.public.coefficients(rows).flatten(1))
            self._expanded = rows.stop


def setup(weight: Tensor, public: PublicMatrix) -> Tensor:
    """Return the hint of one circuit; for many circuits use `PreparedMatrix.setup` of one `PreparedMatrix`."""
    return PreparedMatrix(public).setup(weight)


def multiply_in_float64(weight: Tensor, matrix: Tensor) -> Tensor:
    """Return W·M mod 2^32 for int8 `[out, in]` and int32 `[in, n]`: int32 `[out, n]`, exact for in ≤ 32768 on any machine.

    Every partial sum, in any order, is an integer of at most 128 · 2^31 · in ≤ 2^53, which float64 holds exactly.
    """
    return (weight.double() @ matrix.double()).to(torch.int64).to(torch.int32)


def multiply_by_limbs(weight: Tensor, matrix: Tensor) -> Tensor:
    """Return what `multiply_in_float64` does, by four int8 products; many times as fast with AVX512-VNNI."""
    total = torch.zeros((weight.shape[0], matrix.shape[1]), dtype=torch.int32)
    add_limb_products(weight, balanced_limbs(matrix), total)
    return total


def balanced_limbs(matrix: Tensor) -> Tensor:
    """Return the digits M_l in [-128, 127] of M = Σ_l 2^(8l) · M_l mod 2^32: int32 `[in, n]` → int8 `[4, in, n]`.

    Adding 0x80808080 carries as balanced digits need, and the exclusive or takes the 0x80 away from each byte. The top
    carry is a multiple of 2^32.
    """
    offset = torch.tensor(0x80808080 - 2**32, dtype=torch.int32)
    digits = ((matrix + offset) ^ offset).contiguous().view(torch.int8)  # [in, 4n]
    return digits.view(*matrix.shape, _LIMBS).movedim(-1, 0).contiguous()  # [4, in, n]


def add_limb_products(
    weight: Tensor, limbs: Tensor, total: Tensor, place: int = 0, product: Tensor | None = None
) -> None:
    """Add 2^(8 · place) · W·M mod 2^32 to `total`, in place, for M = Σ_l 2^(8l) · limbs[l].

    A product's 32-bit sums are at most 128 · 128 · in ≤ 2^29, so nothing overflows before the multiplication by 2^(8l),
    which wraps mod 2^32 as wanted; terms of 2^32 and above vanish.

    Args:
        weight: int8 `[out, in]`, in ≤ 32768.
        limbs: int8 `[4, in, n]`.
        total: int32 `[out, n]`, changed.
        place: which base-256 digit of a wider weight `weight` is.
        product: int32 `[out, n]` to work in.
    """
    if product is None:
        product = torch.empty_like(total)
    for limb in range(_LIMBS - place):
        torch._int_mm(weight, limbs[limb], out=product)
        torch.add(total, product, alpha=1 << (8 * (limb + place)), out=total)


@cache
def limb_product_is_exact() -> bool:
    """Return whether int8 products are exact here: some x86 kernels without VNNI saturate when two products are added."""
    weight = torch.tensor([[-128] * 64, [127] * 64, [-128, 127] * 32, [-127, -128] * 32], dtype=torch.int8)
    extremes = torch.tensor([-(2**31), 2**31 - 1, 0x7F7F7F7F, 0x80808080 - 2**32, -1, 0], dtype=torch.int32)
    matrix = extremes.repeat(64, 4)[:, :17].contiguous()  # 17 columns: a vector kernel's remainder too
    matrix[1::2] = matrix[1::2].flip(1)
    try:
        return torch.equal(multiply_by_limbs(weight, matrix), multiply_in_float64(weight, matrix))
    except RuntimeError:  # this build of torch has no int8 product
        return False
