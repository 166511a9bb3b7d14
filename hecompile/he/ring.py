"""Multiply 32-bit and ternary polynomials exactly in Z_q[Y]/(Y^d + 1) or Z_q[Y]/(Y^d - Y^(d/2) + 1), q = 2^32.

With n = d/2 let ω be a root of Z² + 1 or of Z² - Z + 1, so that Y^n takes the values ω and its conjugate at the roots of the
modulus. A real polynomial a of degree < d is determined by its values at the n roots with Y^n = ω. Where ζ^n = ω, those at
ζ·exp(-2πi·j/n) are

    a(ζ·exp(-2πi·j/n)) = Σ_{k<n} (a_k + ω·a_{k+n}) · ζ^k · exp(-2πi·jk/n),        j = 0 … n-1,

so one FFT of length n of the folded and twisted coefficients transforms a, and products are pointwise. (Bernstein,
"Multidigit multiplication for mathematicians", 2001, section 8, calls this the right-angle convolution for ω = i; the second
modulus is used like this in number-theoretic form by Lyubashevsky and Seiler, "NTTRU", CHES 2019.)

Both moduli are bases of larger rings. With m = rank and Y = X^m,

    Z[X]/(X^md + 1)             is a free module over Z[Y]/(Y^d + 1),             m a power of two,
    Z[X]/(X^md - X^(md/2) + 1)  is a free module over Z[Y]/(Y^d - Y^(d/2) + 1),   m three times a power of two,

with basis 1, X, …, X^(m-1); they are the cyclotomic rings of index 2md and 3md. Component k of a product is

    (a·s)_k = Σ_{r≤k} a_{k-r}·s_r + Σ_{r>k} Y·a_{m+k-r}·s_r,

the product of s = (s_0, …, s_{m-1}) and a row of the matrix of multiplication by a.
"""

from __future__ import annotations

import math
import sys
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hecompile.errors import HecompileError
from hecompile.he.kernels.ring_shape import HasRing, trinomial

if sys.byteorder != "little":
    raise HecompileError("hecompile reads words as little-endian bytes and does not run on a big-endian machine")

DOUBLE, SINGLE = 2.0**-53, 2.0**-24
"""Relative error of one rounding in float64 and in float32."""

_ROUND_TO_INTEGER = 1.5 * 2.0**52
"""Number whose sum with |v| < 2^51 rounds v to the nearest integer, which is then, mod 2^32, the low mantissa word."""

_ROOT_OF_THREE = math.sqrt(3)


def times_y(polynomials: NDArray[np.int32], of_trinomial: bool) -> NDArray[np.int32]:
    """Return Y·a mod 2^32 for int32 `[..., d]`: Y^d is -1, or Y^(d/2) - 1."""
    result = np.roll(polynomials, 1, axis=-1)
    if of_trinomial:
        result[..., result.shape[-1] // 2] += polynomials[..., -1]
    np.negative(result[..., 0], out=result[..., 0])
    return result


def rounding_error_bound(params: HasRing, unit: float = DOUBLE) -> float:
    """Return a proven bound on the error of any coefficient of Σ_{k≤m} a_k·s_k before it is rounded to an integer.

    It holds for all |a| ≤ 2^31 and ternary s, however they were chosen; the product is exact where it is below 1/2. `unit`
    is the relative error u of one rounding.

    Percival, "Rapid multiplication modulo the sum and difference of highly composite numbers", Math. Comp. 72 (2003),
    theorem 5.1: an FFT convolution of length n = 2^t is off by at most ‖a‖₂‖s‖₂·((1+u)^3t (1+u√5)^(3t+1) (1+β)^3t - 1),
    where u√5 bounds a complex product (Brent, Percival, Zimmermann, "Error bounds on complex floating-point
    multiplication", Math. Comp. 76, 2007) and β a root of unity. The argument in short: a stage of a forward
    transform is √2 times a unitary matrix, so its error is relative in the 2-norm; by Cauchy and Schwarz the 1-norm of
    the pointwise product is at most n‖a‖₂‖s‖₂; and each output of the inverse is 1/n times a sum in which each term
    passed t butterflies. Here every transform has one more product, by the twist (3 × (1+u√5)(1+β)), the sum over the rank
    adds m - 1 roundings, and a is rounded once where u cannot hold it. Higher radices round no more often on any path.
    ‖a‖₂ ≤ 2^31·√d and ‖s‖₂ ≤ √d. β is taken as twice what correct rounding gives.

    A packed ring has one more product, of Y and transforms of s. With the trinomial, folding and unfolding are products too
    (3 more), and not isometries: |a + ωb|² ≤ 3/2·(a² + b²), for a and for s, and from z = a + ωb come b = Im z·2/√3 and
    a = Re z - Im z/√3, both at most |z|·2/√3. Together that is a factor of 3/2 · 2/√3 = √3.
    """
    stages = math.log2(params.ring_dim / 2)
    products = 3 * stages + 3 + (1 if params.packed else 0) + (3 if trinomial(params) else 0)
    log_growth = (
        (3 * stages + params.rank) * math.log1p(unit)
        + (products + 1) * math.log1p(math.sqrt(5) * unit)
        + products * math.log1p(2 * unit)
    )
    stretch = math.sqrt(3) if trinomial(params) else 1.0
    return stretch * params.rank * params.ring_dim * 2.0**31 * math.expm1(log_growth)


class FoldedFft:
    """Compute the folded FFT for one `ring_dim`, a power of two ≥ 4, and modulus.

    Immutable; share it through `folded_fft`.
    """

    def __init__(self, ring_dim: int, of_trinomial: bool = False) -> None:
        self.ring_dim = ring_dim
        self.half = ring_dim // 2
        self._trinomial = of_trinomial
        turn = math.pi / 3 if of_trinomial else math.pi / 2  # the angle of ω
        angle = torch.arange(self.half, dtype=torch.float64) * (turn / self.half)
        self._twist = torch.polar(torch.ones_like(angle), angle)  # complex128 [d/2]: ζ^k
        # The 1/n of the inverse transform is a power of two, so folding it in here rounds nothing.
        self._untwist = torch.polar(torch.full_like(angle, 1 / self.half), -angle)  # complex128 [d/2]

    def forward(self, coefficients: Tensor) -> Tensor:
        """Transform integer or float64 `[..., d]` to complex128 `[..., d/2]`, the values at ζ·exp(-2πi·j/n)."""
        folded = torch.empty((*coefficients.shape[:-1], self.half, 2), dtype=torch.float64)
        folded[..., 0] = coefficients[..., : self.half]
        folded[..., 1] = coefficients[..., self.half :]
        if self._trinomial:  # times ω = 1/2 + i·√3/2
            folded[..., 0] += folded[..., 1] / 2
            folded[..., 1] *= _ROOT_OF_THREE / 2
        return torch.fft.fft(torch.view_as_complex(folded).mul_(self._twist))  # [..., d/2]

    def inverse(self, values: Tensor, tokens: int | None = None) -> Tensor:
        """Transform complex128 `[..., d/2]` back to int32 `[..., tokens]`: the first `tokens` coefficients, or all d.

        They are rounded to nearest, mod 2^32, and must be below 2^51 in absolute value before.
        """
        tokens = self.ring_dim if tokens is None else tokens
        low = min(tokens, self.half)
        folded = self._inverse_folded(values).add_(_ROUND_TO_INTEGER)
        words = folded.view(torch.int32)[..., ::2]  # [..., d/2, 2]: the low word of each float64
        result = torch.empty((*values.shape[:-1], tokens), dtype=torch.int32)
        result[..., :low] = words[..., :low, 0]
        result[..., low:] = words[..., : tokens - low, 1]
        return result

    def inner_product(self, matrix: Tensor, vector: Tensor, tokens: int | None = None) -> Tensor:
        """Return ⟨M_i, s⟩ mod 2^32 for each row i: complex128 `[rank, rows, d/2]`, `[rank, d/2]` → int32 `[rows, tokens]`.

        Both are outputs of `forward`. Exact for 32-bit × ternary polynomials: see `rounding_error_bound`.
        """
        return self.inverse(self.accumulate(matrix, vector), tokens)

    @staticmethod
    def accumulate(matrix: Tensor, vector: Tensor) -> Tensor:
        """Return Σ_k matrix[k] · vector[k]: complex128 `[rank, rows, d/2]` and `[rank, d/2]` → `[rows, d/2]`."""
        total = matrix[0] * vector[0]
        for k in range(1, len(matrix)):
            total.addcmul_(matrix[k], vector[k])
        return total

    def _inverse_folded(self, values: Tensor) -> Tensor:
        """Invert `forward` without rounding: float64 `[..., d/2, 2]`, coefficients k and k + d/2 side by side."""
        folded = torch.view_as_real(torch.fft.ifft(values, norm="forward").mul_(self._untwist))
        if self._trinomial:
            folded[..., 1] *= 2 / _ROOT_OF_THREE
            folded[..., 0] -= folded[..., 1] / 2
        return folded


def folded_fft(params: HasRing) -> FoldedFft:
    """Return the shared transform of a ring."""
    return _folded_fft(params.ring_dim, trinomial(params))


@lru_cache(maxsize=16)
def _folded_fft(ring_dim: int, of_trinomial: bool) -> FoldedFft:
    return FoldedFft(ring_dim, of_trinomial)


def row_chunks(rows: int, ring_dim: int) -> list[slice]:
    """Cut rows into slices of at most 2^17 coefficients per polynomial column, whose products stay in the cache."""
    step = max(1, 2**17 // ring_dim)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
