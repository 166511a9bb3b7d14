"""Draw the secret vectors that replies are checked with, and say how far an honest worker's sums may deviate.

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
GROUP = 2048
"""Outputs per check: a multiple of _LINE."""

_LINE = 64
"""Features that the kernels take at a time."""

_DEVIATIONS = 8
_MEAN_SQUARE = 2.5
"""Mean of r_i², half of them 1 and half of them 4."""
_LARGEST_SQUARE = 4.0
_LARGEST_INPUTS = 2**15


def check_count(out_features: int) -> int:
    """Return the number of checks per token."""
    return math.ceil(out_features / GROUP)


def tolerance(linear: LinearParameters, square_sum: float | None = None, factor_sum: float | None = None) -> int:
    """Return the largest |D| of a check that passes: 8 standard deviations of an honest worker's Σ_i r_i·ρ'_i, and its mean.

    ρ' is uniform over the G/U multiples of U above -G/2 and up to G/2, as ties go up. So its variance is (G² - U²)/12 and
    its mean U/2, which is as large as the standard deviation where G = 2·U. The result is 0 where the worker rounds nothing.

    Args:
        linear: the circuit.
        square_sum: Σ r_i² of the check; by default the expected one of a full group.
        factor_sum: Σ r_i of the check; by default the root of `square_sum`, which is its standard deviation.

    Raises:
        SecurityError: replies are rounded so coarsely that a wrong one could pass.
    """
    if linear.reply_step <= linear.upload_step:
        return 0
    squares = _MEAN_SQUARE * min(GROUP, linear.out_features) if square_sum is None else square_sum
    mean = linear.upload_step / 2 * abs(math.sqrt(squares) if factor_sum is None else factor_sum)
    allowed = math.ceil(_spread(linear, squares) + mean)
    if 18 * allowed >= 2**LOG_Q:
        raise SecurityError(
            f"replies of {linear.reply_bits} bits for {linear.out_features} outputs cannot be verified: ask for a "
            "higher precision, which takes more bits"
        )
    return allowed


def can_be_verified(linear: LinearParameters) -> bool:
    """Return whether replies of that circuit are fine enough for their check, whatever r is drawn."""
    return 18 * largest_tolerance(linear) < 2**LOG_Q


def largest_tolerance(linear: LinearParameters) -> int:
    """Return the tolerance of a check whose factors are all ±2, 0 where the worker rounds nothing."""
    if linear.reply_step <= linear.upload_step:
        return 0
    outputs = min(GROUP, linear.out_features)
    return math.ceil(_spread(linear, _LARGEST_SQUARE * outputs) + linear.upload_step * outputs)


def _spread(linear: LinearParameters, square_sum: float) -> float:
    """Return 8 standard deviations of Σ_i r_i·ρ'_i for Σ r_i² = `square_sum`."""
    return _DEVIATIONS * math.sqrt(square_sum * (linear.reply_step**2 - linear.upload_step**2) / 12)


@dataclass(frozen=True)
class _Tolerances:
    """Hold the tolerances of one circuit.

    of_token: int64 `[variants, checks]`. spread: 8 standard deviations of a token's Σ_i r_i·ρ'_i, the most of all variants,
    float64 `[checks]`. mean: largest mean of that, float64 `[checks]`. longest: tokens of a window.
    """

    linear: LinearParameters
    of_token: NDArray[np.int64]
    spread: NDArray[np.float64]
    mean: NDArray[np.float64]
    longest: int


class Checks(Unsharable):
    """Hold the secret of one circuit; whoever knows it can cheat, and learns nothing else.

    Attributes:
        variants: how many there are; OLD_VARIANTS in old bundles.
        series: which of the circuit's sets of vectors this is.
        outputs, inputs: the circuit's features.
        vectors_by_lines: the r for the kernels, int8 `[lines, variants, 64]`.
        images_by_lines: the v for the kernels, int32 `[lines, variants · checks, 64]`.

    Args:
        vectors: the r, int32 `[variants, out]`.
        images: the v, int32 `[variants, checks, in]`.
        series: see above.

    Raises:
        InputError: shapes or types do not fit together.
    """

    __slots__ = (
        "_factor_sums", "_square_sums", "_tolerances", "images_by_lines", "inputs", "outputs", "series", "variants",
        "vectors_by_lines",
    )  # fmt: skip

    def __init__(self, vectors: NDArray[np.int32], images: NDArray[np.int32], series: int = 0) -> None:
        variants, outputs = vectors.shape
        if (
            vectors.dtype != np.int32
            or images.dtype != np.int32
            or images.shape[:2] != (variants, check_count(outputs))
        ):
            raise InputError("the check vectors of a circuit do not fit together: export again")
        groups = [vectors[:, at : at + GROUP].astype(np.float64) for at in range(0, outputs, GROUP)]
        self._square_sums = np.stack([np.square(group).sum(axis=1) for group in groups], axis=1)  # [variants, checks]
        self._factor_sums = np.stack([group.sum(axis=1) for group in groups], axis=1)  # likewise
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
    def draw(cls, weight: Tensor, random: SecretRandom) -> Checks:
        """Draw check vectors for int8 or int16 `weight [out, in]`, in ≤ 32768.

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
        return cls(vectors, torch.stack(images, dim=1).to(torch.int32).numpy())

    def window(self, linear: LinearParameters, tokens: int) -> int:
        """Return how many tokens of a request are added up for all variants to check their total: a power of two.

        It is 1 in a request of up to SMALL tokens, else the whole request or LONGEST_WINDOW. An error of q/2 must stay far
        beyond the tolerance of a total, which grows with the tokens and is at most q/8.
        """
        return 1 if tokens <= SMALL else min(self._tolerances_for(linear).longest, 1 << (tokens - 1).bit_length())

    def tolerances(self, linear: LinearParameters) -> NDArray[np.int64]:
        """Return the tolerance of every check of one token, int64 `[variants, checks]`: see `tolerance`."""
        return self._tolerances_for(linear).of_token

    def tolerances_of_total(self, linear: LinearParameters, tokens: int) -> NDArray[np.float64]:
        """Return the tolerance of every check of a total of up to that many tokens, by any variant, float64 `[checks]`.

        It grows with the root of the number, as the standard deviation of independent roundings does. Ties, which all go up,
        have a mean of U/2 besides, which adds up.
        """
        tolerances = self._tolerances_for(linear)
        return math.sqrt(tokens) * tolerances.spread + tokens * tolerances.mean

    def _tolerances_for(self, linear: LinearParameters) -> _Tolerances:
        """Return what follows from the vectors and the circuit, computed once."""
        if self._tolerances is None or self._tolerances.linear != linear:
            pairs = zip(self._square_sums.flat, self._factor_sums.flat, strict=True)
            allowed = np.array([tolerance(linear, float(square), float(total)) for square, total in pairs], dtype=np.int64)
            largest, longest = largest_tolerance(linear), 1
            mean = (linear.upload_step / 2 if largest else 0.0) * np.abs(self._factor_sums).max(axis=0)  # [checks]
            while (
                longest < LONGEST_WINDOW
                and math.sqrt(2 * longest) * largest + 2 * longest * mean.max(initial=0.0) <= 2**LOG_Q / 8
            ):
                longest *= 2
            spread = np.array([_spread(linear, float(square)) for square in self._square_sums.max(axis=0)])
            spread *= float(largest > 0)
            self._tolerances = _Tolerances(linear, allowed.reshape(self._square_sums.shape), spread, mean, longest)
        return self._tolerances

    def pack(self) -> NDArray[np.uint8]:
        """Return what a file holds of this: uint8 `[variants, out + 4 · checks · in]`, r in int8 and then v in little-endian
        int32."""
        images = self.images.reshape(self.variants, -1).astype("<i4")
        return np.concatenate([self.vectors.astype(np.int8).view(np.uint8), images.view(np.uint8)], axis=1)

    @classmethod
    def unpack(cls, packed: NDArray[Any], linear: LinearParameters, series: int = 0) -> Checks:
        """Invert `pack` for that circuit; reads the int32 `[OLD_VARIANTS, out + checks · in]` of old bundles too.

        Raises:
            InputError: the array has another size or type, or values that no r has.
        """
        outputs, inputs = linear.out_features, linear.in_features
        size = check_count(outputs) * inputs
        if packed.dtype == np.int32 and packed.shape == (OLD_VARIANTS, outputs + size):
            vectors, images = packed[:, :outputs], packed[:, outputs:]
        elif packed.dtype == np.uint8 and packed.shape == (VARIANTS, outputs + 4 * size):
            vectors = np.ascontiguousarray(packed[:, :outputs]).view(np.int8).astype(np.int32)
            images = np.ascontiguousarray(packed[:, outputs:]).view("<i4").astype(np.int32)
        else:
            raise InputError(
                f"check vectors of uint8 {[VARIANTS, outputs + 4 * size]} were wanted, got {packed.dtype} "
                f"{list(packed.shape)}: export again"
            )
        if not np.isin(np.abs(vectors), (1, 2)).all():
            raise InputError("check vectors of ±1 and ±2 were wanted, got others: export again")
        return cls(vectors, images.reshape(len(images), -1, inputs), series)

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
