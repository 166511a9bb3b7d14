"""Draw the secret vectors that replies are checked with, and keep what they allow an honest worker's sums to deviate by.

A circuit has VARIANTS vectors r ∈ {±1, ±2}^out with v = rᵀ·W. For each output, independently, a uniform half of the variants
has an odd factor, ±1, the other half ±2, and every sign is uniform. `verification` says what follows from that.
A check covers GROUP outputs. A wider reply has several checks, each with a v of its own, so that the tolerance does not grow
with the width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hecompile.errors import InputError, SecurityError
from hecompile.he.check_tolerances import (
    GROUP,
    KINDS,
    Roundings,
    Rows,
    check_count,
    largest_tolerance,
    tolerances,
)
from hecompile.he.kernels.transform import aligned
from hecompile.he.parameters import LOG_Q, LinearParameters
from hecompile.he.random.sampling import SecretRandom, Unsharable

VARIANTS = 26
MISSED = 1 / math.comb(VARIANTS, VARIANTS // 2)
"""Probability of given parities of an output in all variants: 2^-23.3."""
TOKEN_VARIANTS = 8
"""Variants of a request that check its tokens one by one: a power of two, few enough for the first-level cache."""
MOST_LIKELY = tuple(
    math.prod(VARIANTS / 2 / (VARIANTS - met) for met in range(distinct)) for distinct in range(TOKEN_VARIANTS + 1)
)
"""Bound on the probability of one parity each in so many distinct variants, of the same output or of others."""
OLD_VARIANTS = 8
"""Variants of old bundles, in which each factor was drawn by itself: an output has even ones alone with probability 2^-8."""
SMALL = 8
"""Tokens of a request of which each is checked by all variants."""
LONGEST_WINDOW = 512
"""Most tokens whose total is checked by all variants; divides the tokens of a piece that the kernels work on."""
_LINE = 64
"""Features that the kernels take at a time."""

_LARGEST_INPUTS = 2**15


@dataclass(frozen=True)
class _Tolerances:
    """Hold the tolerances of one circuit.

    of_token: int64 `[variants, checks]`. means: of a token's Σ_i r_i·ρ'_i, float64 `[variants, checks]`. longest: tokens of
    a window.
    """

    linear: LinearParameters
    of_token: NDArray[np.int64]
    means: NDArray[np.float64]
    longest: int


class Checks(Unsharable):
    """Hold the secret of one circuit; whoever knows it can cheat, and learns nothing else.

    Attributes:
        variants: how many there are; OLD_VARIANTS in old bundles.
        series: which of the circuit's sets of vectors this is.
        roundings: how far an honest worker deviates.
        outputs, inputs: the circuit's features.
        vectors_by_lines: the r for the kernels, int8 `[lines, variants, 64]`.
        images_by_lines: the v for the kernels, int32 `[lines, variants · checks, 64]`.

    Args:
        vectors: the r, int32 `[variants, out]`.
        images: the v, int32 `[variants, checks, in]`.
        series: see above.
        roundings: how far an honest worker deviates; by default as for rows of odd weights, none a multiple of another.

    Raises:
        InputError: shapes or types do not fit together.
    """

    __slots__ = (
        "_tolerances", "images_by_lines", "inputs", "outputs", "roundings", "series", "variants", "vectors_by_lines",
    )  # fmt: skip

    def __init__(
        self, vectors: NDArray[np.int32], images: NDArray[np.int32], series: int = 0, roundings: Roundings | None = None
    ) -> None:
        variants, outputs = vectors.shape
        if (
            vectors.dtype != np.int32
            or images.dtype != np.int32
            or images.shape[:2] != (variants, check_count(outputs))
        ):
            raise InputError("the check vectors of a circuit do not fit together: export again")
        self.roundings = Roundings.of_unknown_rows(vectors) if roundings is None else roundings
        self.series, self.variants, self.outputs, self.inputs = series, variants, outputs, images.shape[2]
        self._tolerances: _Tolerances | None = None
        self.vectors_by_lines = _by_lines(vectors.astype(np.int8))
        self.images_by_lines = _by_lines(images.reshape(-1, images.shape[2]))

    @property
    def vectors(self) -> NDArray[np.int32]:
        """Copy the r, int32 `[variants, out]`."""
        return _by_rows(self.vectors_by_lines, self.outputs).astype(np.int32)

    @property
    def images(self) -> NDArray[np.int32]:
        """Copy the v, int32 `[variants, checks, in]`."""
        return _by_rows(self.images_by_lines, self.inputs).reshape(self.variants, -1, self.inputs)

    @classmethod
    def draw(cls, weight: Tensor, random: SecretRandom, rows: Rows | None = None) -> Checks:
        """Draw check vectors for int8 or int16 `weight [out, in]`, in ≤ 32768.

        Args:
            weight: W.
            random: of the factors.
            rows: of that weight, where they are known.

        Raises:
            SecurityError: `random` is anything but a SecretRandom.
            InputError: the weight has another type or shape.
        """
        if type(random) is not SecretRandom:
            raise SecurityError("check vectors are drawn from SecretRandom, never from a public seed or stream")
        if weight.dtype not in (torch.int8, torch.int16) or weight.dim() != 2 or weight.shape[1] > _LARGEST_INPUTS:
            raise InputError(f"a weight is int8 or int16 [out, in], got {weight.dtype} {list(weight.shape)}")
        outputs = len(weight)
        vectors = _draw_vectors(outputs, random)
        # Sums of GROUP int8 are at most 2^19 and exact in float32; of int16 at most 2^27, in float64.
        exact = torch.float32 if weight.dtype == torch.int8 else torch.float64
        groups = [slice(at, at + GROUP) for at in range(0, outputs, GROUP)]
        images = [torch.from_numpy(vectors[:, group]).to(exact) @ weight[group].to(exact) for group in groups]
        roundings = (rows or Rows(weight, random)).roundings(vectors)
        return cls(vectors, torch.stack(images, dim=1).to(torch.int32).numpy(), roundings=roundings)

    def window(self, linear: LinearParameters, tokens: int) -> int:
        """Return how many tokens of a request are added up for all variants to check their total: a power of two.

        It is 1 in a request of up to SMALL tokens, else the whole request or LONGEST_WINDOW. An error of q/2 must stay far
        beyond the tolerance of a total, which grows with the tokens and is at most q/8.
        """
        return 1 if tokens <= SMALL else min(self._tolerances_for(linear).longest, 1 << (tokens - 1).bit_length())

    def tolerances(self, linear: LinearParameters) -> NDArray[np.int64]:
        """Return the tolerance of every check of one token, int64 `[variants, checks]`: see `check_tolerances.tolerance`.

        Raises:
            SecurityError: replies are rounded so coarsely that a wrong one could pass.
        """
        return self._tolerances_for(linear).of_token

    def tolerances_of_total(self, linear: LinearParameters, tokens: int) -> NDArray[np.float64]:
        """Return the tolerance of every check of a total of that many tokens, float64 `[variants, checks]`.

        It grows with the root of the number, as the standard deviation of independent roundings does.
        """
        return math.sqrt(tokens) * self._tolerances_for(linear).of_token

    def means(self, linear: LinearParameters) -> NDArray[np.float64]:
        """Return what an honest worker's D of one token is in the mean, float64 `[variants, checks]`: ties all go up."""
        return self._tolerances_for(linear).means

    def _tolerances_for(self, linear: LinearParameters) -> _Tolerances:
        """Return what follows from the vectors and the circuit, computed once."""
        if self._tolerances is None or self._tolerances.linear != linear:
            of_token, longest = tolerances(linear, self.roundings), 1
            largest = max(largest_tolerance(linear), int(of_token.max(initial=0)))
            while longest < LONGEST_WINDOW and 128 * longest * largest**2 <= 4**LOG_Q:
                longest *= 2
            self._tolerances = _Tolerances(linear, of_token, self.roundings.means(linear), longest)
        return self._tolerances

    def pack(self) -> NDArray[np.uint8]:
        """Return what a file holds of this: uint8 `[variants, out + 4 · checks · (in + 2 · KINDS)]`.

        These are r in int8, then in little-endian int32 v and the two arrays of `Roundings`, each by checks.
        """
        words = (self.images, self.roundings.squares, self.roundings.sums)
        octets = [np.ascontiguousarray(part.reshape(self.variants, -1), dtype="<i4").view(np.uint8) for part in words]
        return np.concatenate([self.vectors.astype(np.int8).view(np.uint8), *octets], axis=1)

    @classmethod
    def unpack(cls, packed: NDArray[Any], linear: LinearParameters, series: int = 0) -> Checks:
        """Invert `pack` for that circuit.

        Reads two older formats without roundings too: uint8 `[variants, out + 4 · checks · in]`, and int32
        `[OLD_VARIANTS, out + checks · in]`.

        Raises:
            InputError: the array has another size or type, or values that no r has.
        """
        outputs, inputs, checks = linear.out_features, linear.in_features, check_count(linear.out_features)
        size, kinds = checks * inputs, checks * KINDS
        widths = outputs + 4 * size, outputs + 4 * (size + 2 * kinds)
        roundings = None
        if packed.dtype == np.int32 and packed.shape == (OLD_VARIANTS, outputs + size):
            vectors, images = packed[:, :outputs], packed[:, outputs:]
        elif packed.dtype == np.uint8 and packed.ndim == 2 and len(packed) == VARIANTS and packed.shape[1] in widths:
            vectors = np.ascontiguousarray(packed[:, :outputs]).view(np.int8).astype(np.int32)
            words = np.ascontiguousarray(packed[:, outputs:]).view("<i4").astype(np.int32)
            images = words[:, :size]
            if packed.shape[1] == widths[1]:
                parts = words[:, size : size + kinds], words[:, size + kinds :]
                roundings = Roundings(*(part.reshape(VARIANTS, checks, KINDS) for part in parts))
        else:
            raise InputError(
                f"check vectors of uint8 {[VARIANTS, widths[1]]} were wanted, got {packed.dtype} {list(packed.shape)}: "
                "export again"
            )
        if not np.isin(np.abs(vectors), (1, 2)).all():
            raise InputError("check vectors of ±1 and ±2 were wanted, got others: export again")
        if roundings is not None and (roundings.squares < 0).any():
            raise InputError("check vectors have sums of squares below zero: export again")
        return cls(vectors, images.reshape(len(images), -1, inputs), series, roundings)

    def check_fits(self, linear: LinearParameters) -> None:
        """Check the shape of the circuit, which the kernels do not.

        Raises:
            InputError: these are the check vectors of a circuit of another shape.
        """
        if (self.outputs, self.inputs) != (linear.out_features, linear.in_features):
            raise InputError("the check vectors are of another circuit: export again")


def _draw_vectors(outputs: int, random: SecretRandom) -> NDArray[np.int32]:
    """Draw the r, int32 `[VARIANTS, outputs]`."""
    keys = random.uniform_bytes(8 * VARIANTS * outputs).view(np.uint64).reshape(VARIANTS, outputs)
    odd = keys.argsort(axis=0).argsort(axis=0) < VARIANTS // 2  # a uniform half, up to ties of 64 bits
    signs = 1 - 2 * random.below_power_of_two(1, odd.size).reshape(odd.shape)
    vectors: NDArray[np.int32] = (signs * np.where(odd, 1, 2)).astype(np.int32)
    return vectors


def _by_lines(rows: NDArray[Any]) -> NDArray[Any]:
    """Cut rows into lines of 64 features: `[rows, features]` → `[lines, rows, 64]`, padded with zeros, aligned.

    What the kernels want for a line then lies together. The rows themselves would compete for the same few cache sets.
    """
    count, features = rows.shape
    lines = -(-features // _LINE)
    flat: NDArray[Any] = aligned(lines * count * _LINE, rows.dtype.type)
    flat[:] = 0
    result = flat.reshape(lines, count, _LINE)
    whole = features // _LINE
    result[:whole] = rows[:, : whole * _LINE].reshape(count, whole, _LINE).transpose(1, 0, 2)
    if whole < lines:
        result[whole, :, : features - whole * _LINE] = rows[:, whole * _LINE :]
    return result


def _by_rows(lines: NDArray[Any], features: int) -> NDArray[Any]:
    """Invert `_by_lines`."""
    return np.ascontiguousarray(lines.transpose(1, 0, 2).reshape(lines.shape[1], -1)[:, :features])
