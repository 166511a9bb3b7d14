"""Check parameters: an unchecked literal goes in, an immutable object that is secure and cannot overflow comes out."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from hecompile.errors import InputError, SecurityError
from hecompile.he import hint_rounding
from hecompile.he.kernels.ring_shape import SMALLEST_RING_DIM
from hecompile.he.random.sampling import ERROR_BOUND, SIGMA
from hecompile.he.ring import SINGLE, rounding_error_bound
from hecompile.he.security import MINIMUM_BITS, security_bits, show_bits
from hecompile.he.weight_norms import WeightNorms, measure_norms
from hecompile.word_sizes import bytes_of

LOG_Q = 32
MIN_BITS = 8
"""Fewest bits of a word: one byte, so that no message is much larger in memory than on the wire."""

SINGLE_ERROR_BOUND = 55_000_000
"""Upper bound on `rounding_error_bound` in float32, plus half for rounding to an integer: larger rings are refused."""

SINGLE_ERROR_STD = 2.0**13
"""Upper bound on the measured standard deviation of that error: tests/hecompile/he/kernels/test_single_precision.py."""

LARGEST_GAIN = 64.0
"""Largest gain of a bound, of a matrix whose rows have little in common with what they are multiplied with."""

_LONGEST_INPUT = 2.0**30
"""Norm beyond which no gain scales a token, so that its integers stay far within a word."""

_NORM_SLACK = 1e-9
"""Far above the rounding of the float64 norms that the two sides of the comparison are made of."""


def _can_be_packed(rank: int) -> bool:
    """Return whether there is a ring of which `rank` features share an element: see `ring.py`."""
    odd_part = rank // (rank & -rank)
    return rank > 1 and odd_part in (1, 3)


@dataclass
class RingParametersLiteral:
    """Hold what a file or an option says, unchecked until `RingParameters.from_literal` takes it."""

    ring_dim: int
    rank: int
    log_q: int = LOG_Q
    sigma: float = SIGMA
    packed: bool = False


@dataclass(frozen=True)
class RingParameters:
    """Define the LWE instance: q = 2^log_q, error width sigma, and tokens along the ring_dim coefficients of a base ring.

    Not packed, it is module-LWE: rows of R_q^rank with R_q = Z_q[Y]/(Y^ring_dim + 1), one row for each feature.

    Packed, it is ring-LWE in dimension N = ring_dim · rank, in Z_q[X]/(X^N + 1) or, for ranks divisible by 3,
    Z_q[X]/(X^N - X^(N/2) + 1). A ring element serves `rank` features, by Y = X^rank (`ring.py`). So the public matrix is
    `rank` times smaller; its rows, one for each feature, are in R_q^rank over the base ring as before.

    Raises:
        InputError: ring_dim is no power of two or too small, rank is not positive or no packed ring has it, or the ring is
            so large that products are not exact in float64, or further off in float32 than `SINGLE_ERROR_BOUND`.
        SecurityError: less than 128 bits, or an error width that the sampler does not draw.
    """

    ring_dim: int
    rank: int
    log_q: int = LOG_Q
    sigma: float = SIGMA
    packed: bool = False

    insecure: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.ring_dim, int) or not isinstance(self.rank, int):
            raise InputError(f"ring_dim and rank must be whole numbers, got {self.ring_dim} and {self.rank}")
        smallest = 4 if self.insecure else SMALLEST_RING_DIM  # the simple path, which tests use, takes smaller ones
        if self.ring_dim < smallest or self.ring_dim & (self.ring_dim - 1):
            raise InputError(f"ring_dim must be a power of two of at least {smallest}, got {self.ring_dim}")
        if self.rank < 1:
            raise InputError(f"rank must be at least 1, got {self.rank}")
        if self.packed and not _can_be_packed(self.rank):
            raise InputError(f"a packed ring's rank is a power of two, or three times one, and above 1: got {self.rank}")
        if self.log_q != LOG_Q:
            raise InputError(f"log_q must be {LOG_Q}, the word that ciphertexts are made of, got {self.log_q}")
        if self.sigma != SIGMA:
            raise SecurityError(f"sigma must be {SIGMA}, the width that the sampler draws, got {self.sigma}")
        if rounding_error_bound(self) >= 0.5:
            raise InputError(f"ring products at {self.ring_dim} x {self.rank} are not exact: take a smaller rank")
        if not self.insecure and rounding_error_bound(self, SINGLE) + 0.5 > SINGLE_ERROR_BOUND:
            raise InputError(
                f"{self.ring_dim} x {self.rank} is larger than what decryption in float32 is proven for: "
                f"take one of {', '.join(CATALOGUE)}"
            )
        if not self.insecure and self.security_bits < MINIMUM_BITS:
            raise SecurityError(
                f"{self.ring_dim} x {self.rank} gives {show_bits(self.security_bits)}, under {MINIMUM_BITS:.0f}: "
                f"take one of {', '.join(CATALOGUE)}"
            )

    @classmethod
    def from_literal(cls, literal: RingParametersLiteral) -> RingParameters:
        """Check a literal. There is none for insecure parameters, so no file can ask for them."""
        return RingParameters(literal.ring_dim, literal.rank, literal.log_q, literal.sigma, literal.packed)

    def to_literal(self) -> RingParametersLiteral:
        """Return the plain fields, to be written to a file.

        Raises:
            SecurityError: these are insecure test parameters.
        """
        if self.insecure:
            raise SecurityError("insecure test parameters are not written to a file")
        return RingParametersLiteral(self.ring_dim, self.rank, self.log_q, self.sigma, self.packed)

    @property
    def packing(self) -> int:
        """Return how many features share a ring element: the rank, or 1."""
        return self.rank if self.packed else 1

    @property
    def lattice_dim(self) -> int:
        """Return the dimension at which LWE is counted: ring_dim · rank."""
        return self.ring_dim * self.rank

    @property
    def security_bits(self) -> float:
        """Return the bits of security by the table in `security`."""
        return security_bits(self.lattice_dim, self.log_q, self.sigma)


class InsecureTestParameters(RingParameters):
    """Define a toy ring with no security at all, made by `test_insecure_parameters` only, and never equal to a real one."""

    insecure: ClassVar[bool] = True

    @property
    def security_bits(self) -> float:
        """Return 0: there is no security."""
        return 0.0


def test_insecure_parameters(ring_dim: int = 16, rank: int = 2, packed: bool = False) -> InsecureTestParameters:
    """Make a ring small enough for tests to check by hand. It hides nothing; never use it outside a test."""
    return InsecureTestParameters(ring_dim, rank, packed=packed)


test_insecure_parameters.__test__ = False  # type: ignore[attr-defined]  # its name would make pytest collect it

# A longer ring makes the hints cheaper to transform per token; a shorter one wastes less on short sequences. 128x12, 256x6
# and 512x3 are one ring, Z_q[X]/(X^1536 - X^768 + 1); 1024x2 and 2048x1 are Z_q[X]/(X^2048 + 1). Each has at least 161 bits,
# because all secrets of a bundle share A: for 2^33 secrets 128 bits are left (a hybrid argument: log2 of their number less),
# under MATZOV alone: under ADPS16 dimension 1536 has 135 bits, and 102 are left.
# Rings of 1280 dimensions, at 133 bits, have no such margin and cost more than packed ones; older bundles may have them.
CATALOGUE: dict[str, RingParameters] = {
    f"{ring_dim}x{rank}": RingParameters(ring_dim, rank, packed=_can_be_packed(rank))
    for ring_dim, rank in ((128, 12), (256, 6), (512, 3), (1024, 2), (2048, 1))
}


@dataclass(frozen=True)
class LinearParameters:
    """Describe one circuit: a public int8 or int16 matrix W `[out_features, in_features]`, and the bits of a word each way.

    Args:
        upload_bits: B, bits of an uploaded word; below 32, the client rounds b to a multiple of U = 2^(32-B).
        reply_bits: C ≤ B, bits of a returned word; the worker rounds to a multiple of G = 2^(32-C).
        max_l1: largest ‖W_i‖₁ of a row.
        max_l2: largest ‖W_i‖₂ of a row.
        gain: how many times longer than proven a token may be: 1, or more from calibration (`hecompile.he.wraps`).
        hint_bits: bits of a word of the hint, 16 to 32; below 32, it is rounded to a multiple of S = 2^(32-hint_bits).

    Raises:
        InputError: a field is out of range, or so little room is left that no non-zero input fits.
    """

    in_features: int
    out_features: int
    max_l1: int
    max_l2: float
    upload_bits: int = LOG_Q
    reply_bits: int = LOG_Q
    gain: float = 1.0
    hint_bits: int = LOG_Q

    def __post_init__(self) -> None:
        if not 1.0 <= self.gain <= LARGEST_GAIN:
            raise InputError(f"the gain of a bound must be in [1, {LARGEST_GAIN:.0f}], got {self.gain}")
        if self.in_features < 1 or self.out_features < 1:
            raise InputError(f"a linear needs at least one feature each way: {self.in_features}, {self.out_features}")
        if not MIN_BITS <= self.reply_bits <= self.upload_bits <= LOG_Q:
            raise InputError(
                f"{MIN_BITS} <= reply_bits <= upload_bits <= {LOG_Q} is wanted, got {self.reply_bits} and {self.upload_bits}"
            )
        if not hint_rounding.FEWEST_BITS <= self.hint_bits <= LOG_Q:
            raise InputError(f"a word of a hint has {hint_rounding.FEWEST_BITS} to {LOG_Q} bits, got {self.hint_bits}")
        if not 0 <= self.max_l1 <= 2**15 * self.in_features:
            raise InputError(f"max_l1 {self.max_l1} is impossible for {self.in_features} int16 weights in a row")
        if not (math.isfinite(self.max_l2) and 0 <= self.max_l2 <= self.max_l1 + 1e-6):
            raise InputError(f"max_l2 {self.max_l2} cannot belong to rows with max_l1 {self.max_l1}")
        if self.input_bound < 1:
            raise InputError(
                f"row norm {self.max_l1} with words of {self.upload_bits} bits up and {self.reply_bits} down leaves no room "
                "for an input: use more bits"
            )

    @classmethod
    def from_weight(cls, weight: Tensor, upload_bits: int = LOG_Q, reply_bits: int = LOG_Q) -> LinearParameters:
        """Make the parameters of int8 or int16 `weight [out, in]`, whose norms are measured."""
        return cls.from_norms(measure_norms(weight)[0], upload_bits, reply_bits)

    @classmethod
    def from_norms(
        cls, norms: WeightNorms, upload_bits: int = LOG_Q, reply_bits: int = LOG_Q, gain: float = 1.0
    ) -> LinearParameters:
        """Make the parameters of a matrix that was measured before."""
        return cls(norms.in_features, norms.out_features, norms.max_l1, norms.max_l2, upload_bits, reply_bits, gain)

    @cached_property
    def proven(self) -> LinearParameters:
        """Return the same circuit with a gain of 1, under which no product can overflow."""
        return self if self.gain == 1.0 else dataclasses.replace(self, gain=1.0)

    @property
    def upload_limbs(self) -> int:
        """Return L, the bytes that hold an uploaded word: the lowest 8·L - B bits of them are 0."""
        return bytes_of(self.upload_bits)

    @property
    def reply_bytes(self) -> int:
        """Return R, the bytes that hold a returned word: the lowest 8·R - C bits of them are 0."""
        return bytes_of(self.reply_bits)

    @property
    def upload_step(self) -> int:
        """Return U, to whose multiples ciphertext words are rounded: 1 where all 32 bits are sent."""
        return 1 << (LOG_Q - self.upload_bits)

    @property
    def reply_step(self) -> int:
        """Return G, to whose multiples replies are rounded."""
        return 1 << (LOG_Q - self.reply_bits)

    @property
    def decryption_precision(self) -> type[np.floating]:
        """Return float32 where replies are rounded to multiples of 2^16 or more, float64 otherwise.

        Beside such rounding the error of float32 is small, and it takes half the time. The masks of encryption are always
        exact.
        """
        return np.float32 if self.reply_bits <= 16 else np.float64

    @property
    def _decryption_error(self) -> int:
        """Return the largest error of the product of hint and secret that decryption subtracts."""
        return SINGLE_ERROR_BOUND if self.decryption_precision is np.float32 else 0

    @property
    def _upload_error(self) -> int:
        """Return the largest |ρ| from rounding b to a multiple of U: 0 or U/2."""
        return self.upload_step // 2 if self.upload_step > 1 else 0

    @property
    def _reply_error(self) -> int:
        """Return the largest |ρ'| from rounding a multiple of U to a multiple of G: 0 or G/2."""
        return self.reply_step // 2 if self.reply_step > self.upload_step else 0

    @property
    def noise_bound(self) -> int:
        """Return the largest |decrypted - W·x| that can ever occur: max_l1 · (ERROR_BOUND + U/2) + G/2 + D.

        U/2 and G/2 are 0 where nothing is rounded. D is the largest error of the mask that decryption subtracts: that of
        float32, 0 in float64, and that of a rounded hint.
        """
        mask_error = self._decryption_error + hint_rounding.error_bound(self.hint_bits)
        return self.max_l1 * (ERROR_BOUND + self._upload_error) + self._reply_error + mask_error

    @cached_property
    def room(self) -> int:
        """Return the largest |W_i·x| for which x decrypts without overflow, whatever the secret and the error.

        Proof. The client sends b' = b + ρ mod q with b = ⟨A, s⟩ + e + x, |ρ| ≤ U/2, as a multiple of U: it is
        word = b'/V mod 2^(8L), where V = 2^(32-8L) divides U. The worker has Y with V·Y = W·b' mod q, and replies Y' with
        V·Y' = W·b' + ρ' mod q, |ρ'| ≤ G/2. As V divides q, the wrap mod 2^(8L) is the wrap mod q. The client subtracts
        ⟨H, s⟩ + δ = W·⟨A, s⟩ + δ mod q, where |δ| ≤ D, and is left with Z = W·(x + e + ρ) + ρ' - δ mod q. Row i of the
        integer Z is at most |W_i·x| + ‖W_i‖₁·(ERROR_BOUND + U/2) + G/2 + D = |W_i·x| + noise_bound ≤ room +
        noise_bound = 2^31 - 1 = q/2 - 1, so the centred residue is Z.
        """
        return 2 ** (LOG_Q - 1) - 1 - self.noise_bound

    @cached_property
    def input_bound(self) -> int:
        """Return the largest X such that every |x| ≤ X stays within `room`: |W_i·x| ≤ ‖W_i‖₁·‖x‖_∞ (Hölder)."""
        return self.room // max(1, self.max_l1)

    @cached_property
    def norm_bound(self) -> float:
        """Return N, up to which the Euclidean norm of a real x is scaled: `gain` times the proven one; may be negative.

        With a gain of 1, x of norm ≤ N, rounded to integers, stays within `room`: |W_i·x| ≤ ‖W_i‖₂·‖x‖₂ (Cauchy-Schwarz),
        and rounding adds at most √in/2 to the norm. Where weights and activations are not all of one size, this admits far
        larger x than `input_bound`: by 0.8 · crest for Gaussian weights. With a larger gain nothing is proven, and the
        client looks for products that wrapped (`hecompile.he.wraps`).
        """
        proven = (self.room / max(1.0, self.max_l2) - math.sqrt(self.in_features) / 2) * (1 - _NORM_SLACK)
        return min(proven * self.gain, max(proven, _LONGEST_INPUT))

    def admits(self, x: Tensor) -> Tensor:
        """Return which rows of integer `x [T, in]` are within `room` by one of the two inequalities, whatever the gain: bool
        `[T]`."""
        largest = x.abs().amax(dim=1).double()  # [T]
        length = torch.linalg.vector_norm(x.double(), dim=1)  # [T]
        return (largest <= self.input_bound) | (length * max(1.0, self.max_l2) <= self.room)

    def noise_std(self, row_l2: Tensor | float) -> Tensor | float:
        """Predict the standard deviation of decrypted - W·x in a row with ‖W_i‖₂ = `row_l2` (a number or a float tensor).

        It is √((σ² + (U² - 1)/12)·‖W_i‖₂² + (G² - U²)/12): the error, and two roundings of uniform words, each uniform over
        the multiples of the finer step within the coarser one. Decryption in float32 adds SINGLE_ERROR_STD² to the variance,
        as if its error were independent of those, a rounded hint what `hint_rounding` says.
        """
        error = SIGMA**2 + (self.upload_step**2 - 1) / 12
        rounding = (self.reply_step**2 - self.upload_step**2) / 12
        decryption = SINGLE_ERROR_STD**2 if self.decryption_precision is np.float32 else 0.0
        hint = hint_rounding.error_variance(self.hint_bits)
        return (error * row_l2**2 + rounding + decryption + hint) ** 0.5

    def bytes_up(self, tokens: int) -> int:
        """Return the bytes of the ciphertext of `tokens` tokens, as packed for the wire but for its padding to 64 words."""
        return bytes_of(self.upload_bits * tokens * self.in_features)

    def bytes_down(self, tokens: int) -> int:
        """Return the bytes of the reply for `tokens` tokens, counted likewise."""
        return bytes_of(self.reply_bits * tokens * self.out_features)
