"""Exact products in R_q = Z_q[X]/(X^d + 1), q = 2^32, of 32-bit and ternary polynomials, by a folded complex FFT.

A real polynomial a of degree < d is determined by its values at d/2 of the roots of X^d + 1, one of each conjugate
pair. With n = d/2 and ζ = exp(iπ/d), those at ζ^(1-4j) are (as ζ^n = i and ζ^(-4jn) = 1)

    a(ζ^(1-4j)) = Σ_{k<n} (a_k + i·a_{k+n}) · ζ^k · exp(-2πi·jk/n),        j = 0 … n-1,

so one FFT of length n of the folded and twisted coefficients transforms a, and products are pointwise.
(Bernstein, "Multidigit multiplication for mathematicians", 2001, section 8, calls this the right-angle convolution.)
"""

from __future__ import annotations

import math
import sys
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from hecompile.errors import HecompileError

if sys.byteorder != "little":
    raise HecompileError("hecompile reads words as little-endian bytes and does not run on a big-endian machine")

DOUBLE, SINGLE = 2.0**-53, 2.0**-24
"""Relative error of one rounding in float64 and in float32."""

_ROUND_TO_INTEGER = 1.5 * 2.0**52
"""Adding it to |v| < 2^51 rounds v to the nearest integer and leaves that integer mod 2^32 in the low mantissa word."""


class HasRing(Protocol):
    """Anything with a ring: `RingParameters` here, but the ring arithmetic need not know it."""

    @property
    def ring_dim(self) -> int: ...
    @property
    def rank(self) -> int: ...


def rounding_error_bound(params: HasRing, unit: float = DOUBLE) -> float:
    """Proven bound on the error of any coefficient of Σ_{k≤m} a_k·s_k before it is rounded to an integer.

    Holds for all |a| ≤ 2^31 and ternary s, however they were chosen; the product is exact where it is below 1/2. `unit` is
    the relative error u of one rounding.

    Percival, "Rapid multiplication modulo the sum and difference of highly composite numbers", Math. Comp. 72 (2003),
    theorem 5.1: an FFT convolution of length n = 2^t is off by at most ‖a‖₂‖s‖₂·((1+u)^3t (1+u√5)^(3t+1) (1+β)^3t - 1),
    where u√5 bounds a complex product (Brent, Percival, Zimmermann, "Error bounds on complex floating-point
    multiplication", Math. Comp. 76, 2007) and β a root of unity. The argument in short: a stage of a forward
    transform is √2 times a unitary matrix, so its error is relative in the 2-norm; by Cauchy and Schwarz the 1-norm of
    the pointwise product is at most n‖a‖₂‖s‖₂; and each output of the inverse is 1/n times a sum in which each term
    passed t butterflies. Here every transform has one more product, by the twist (3 × (1+u√5)(1+β)), the sum over the rank
    adds m - 1 roundings, and a is rounded once where u cannot hold it. Higher radices round no more often on any path.
    ‖a‖₂ ≤ 2^31·√d and ‖s‖₂ ≤ √d. For β twice what correct rounding gives is granted.
    """
    stages = math.log2(params.ring_dim / 2)
    log_growth = (
        (3 * stages + params.rank) * math.log1p(unit)
        + (3 * stages + 4) * math.log1p(math.sqrt(5) * unit)
        + (3 * stages + 3) * math.log1p(2 * unit)
    )
    return params.rank * params.ring_dim * 2.0**31 * math.expm1(log_growth)


class NegacyclicFft:
    """The folded FFT for one `ring_dim` (a power of two ≥ 4). Immutable; share it through `negacyclic_fft`."""

    def __init__(self, ring_dim: int) -> None:
        self.ring_dim = ring_dim
        self.half = ring_dim // 2
        angle = torch.arange(self.half, dtype=torch.float64) * (math.pi / ring_dim)
        self._twist = torch.polar(torch.ones_like(angle), angle)  # complex128 [d/2]: ζ^k
        # The 1/n of the inverse transform is a power of two, so folding it in here rounds nothing.
        self._untwist = torch.polar(torch.full_like(angle, 1 / self.half), -angle)  # complex128 [d/2]

    def forward(self, coefficients: Tensor) -> Tensor:
        """Integer or float64 `[..., d]` → complex128 `[..., d/2]`, the values at ζ^(1-4j)."""
        folded = torch.empty((*coefficients.shape[:-1], self.half, 2), dtype=torch.float64)
        folded[..., 0] = coefficients[..., : self.half]
        folded[..., 1] = coefficients[..., self.half :]
        return torch.fft.fft(torch.view_as_complex(folded).mul_(self._twist))  # [..., d/2]

    def inverse_real(self, values: Tensor) -> Tensor:
        """Complex128 `[..., d/2]` → float64 `[..., d]`, before rounding."""
        folded = self._inverse_folded(values)
        return torch.cat((folded[..., 0], folded[..., 1]), dim=-1)  # [..., d]

    def inverse(self, values: Tensor, tokens: int | None = None) -> Tensor:
        """Complex128 `[..., d/2]` → int32 `[..., tokens]`: rounded to nearest, mod 2^32, the first `tokens` (or all d).

        The values before rounding must be below 2^51 in absolute value.
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
        """⟨M_i, s⟩ mod 2^32 for each row i: complex128 `[rank, rows, d/2]` and `[rank, d/2]` → int32 `[rows, tokens]`.

        Both are outputs of `forward`. Exact for 32-bit × ternary polynomials: see `rounding_error_bound`.
        """
        return self.inverse(self.accumulate(matrix, vector), tokens)

    @staticmethod
    def accumulate(matrix: Tensor, vector: Tensor) -> Tensor:
        """Σ_k matrix[k] · vector[k]: complex128 `[rank, rows, d/2]` and `[rank, d/2]` → `[rows, d/2]`."""
        total = matrix[0] * vector[0]
        for k in range(1, len(matrix)):
            total.addcmul_(matrix[k], vector[k])
        return total

    def _inverse_folded(self, values: Tensor) -> Tensor:
        """Complex128 `[..., d/2]` → float64 `[..., d/2, 2]`: coefficients k and k + d/2 side by side."""
        return torch.view_as_real(torch.fft.ifft(values, norm="forward").mul_(self._untwist))


@lru_cache(maxsize=16)
def negacyclic_fft(ring_dim: int) -> NegacyclicFft:
    """The shared transform for `ring_dim`."""
    return NegacyclicFft(ring_dim)


def row_chunks(rows: int, ring_dim: int) -> list[slice]:
    """Slices of at most 2^17 coefficients per polynomial column, so that a chunk's products stay in the cache."""
    step = max(1, 2**17 // ring_dim)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
