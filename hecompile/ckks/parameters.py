"""Check CKKS parameters, an unchecked literal in and an immutable object out, and choose the cheapest that will do.

A ciphertext of level l has the moduli q_0 … q_{l+1}: two primes stay at the end, room for values up to 2^(bits - 1), and
one is divided off per multiplication. Level l has one exact scale, Δ_{l-1} = Δ_l² / q_{l+1} (Kim, Papadimitriou, Polyakov,
"Approximate homomorphic encryption with reduced approximation error", CT-RSA 2022): ciphertexts of one level can be added as
they are. Every prime is below 2^31, so that words are 32 bits.

Security: log2 of the whole modulus, the special prime of the evaluation keys included, is at most the largest for which the
project's own table (`hecompile.he.security`) vouches for 128 bits. SEAL checks besides that the Homomorphic Encryption
Standard (Albrecht et al., 2018, table 1) allows it, which alone would be too little.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hecompile.ckks.library import seal
from hecompile.errors import InputError, SecurityError
from hecompile.he.security import COST_MODEL, MINIMUM_BITS, largest_modulus_bits, security_bits

SIGMA = 3.2
"""Standard deviation of SEAL's errors."""
MAX_MODULUS_BITS = {ring_dim: largest_modulus_bits(ring_dim, SIGMA) for ring_dim in (4096, 8192, 16384, 32768)}
"""Bits of the whole modulus at 128 bits of security, by ring_dim. A ring of 4096 has no room for a level. Nothing is known
yet of longer moduli in rings of 32768."""
BASE_PRIMES = 2
SPECIAL_BITS = 31
MAX_SCALE_BITS, MIN_SCALE_BITS = 30, 22


def modulus_bits(levels: int, scale_bits: int = MAX_SCALE_BITS) -> int:
    """Bound log2 of the whole modulus from above: `levels` primes of `scale_bits`, the two that stay, the special prime."""
    return SPECIAL_BITS + (levels + BASE_PRIMES) * scale_bits


@dataclass(frozen=True)
class CkksLiteral:
    """Hold unchecked parameters."""

    ring_dim: int
    """N; a ciphertext has N/2 slots."""
    levels: int
    """Multiplications between refreshes."""
    scale_bits: int = MAX_SCALE_BITS
    """Bits of a prime and of the scale."""

    @property
    def modulus_bits(self) -> int:
        """Return an upper bound of log2 of the whole modulus."""
        return modulus_bits(self.levels, self.scale_bits)

    @property
    def error_bits(self) -> float:
        """Return -log2 of the standard deviation that rounding in one rescaling adds to every slot, for values of size 1.

        The rounding c0 + c1·s has variance (1 + 2N/3)/12 per coefficient for ternary s, and a slot is a sum of N of them:
        N/√18.
        """
        return self.scale_bits - float(np.log2(self.ring_dim / np.sqrt(18)))

    def validate(self) -> CkksParameters:
        """Check the literal.

        Raises:
            SecurityError: under 128 bits.
            InputError: no set has these numbers.
        """
        return CkksParameters(self)


@dataclass(frozen=True)
class CkksParameters:
    """Hold a validated set; equal literals give equal primes.

    Raises:
        SecurityError: under 128 bits.
        InputError: no set has these numbers.
    """

    literal: CkksLiteral
    moduli: tuple[int, ...] = field(init=False)
    """q_0 …, then the special prime P."""
    scales: tuple[float, ...] = field(init=False)
    """Δ_l at place l."""

    def __post_init__(self) -> None:
        literal = self.literal
        if literal.ring_dim not in MAX_MODULUS_BITS or literal.levels < 1:
            raise InputError(
                f"CKKS needs a ring dimension of {', '.join(map(str, MAX_MODULUS_BITS))} and at least one level; got "
                f"{literal.ring_dim} and {literal.levels}"
            )
        if not MIN_SCALE_BITS <= literal.scale_bits <= MAX_SCALE_BITS:
            raise InputError(f"scale_bits must be {MIN_SCALE_BITS} to {MAX_SCALE_BITS}, got {literal.scale_bits}")
        if literal.modulus_bits > MAX_MODULUS_BITS[literal.ring_dim]:
            raise SecurityError(
                f"{literal.levels} levels of {literal.scale_bits} bits take a modulus of {literal.modulus_bits} bits; "
                f"{MINIMUM_BITS:.0f} bits of security ({COST_MODEL}) at ring dimension {literal.ring_dim} allow "
                f"{MAX_MODULUS_BITS[literal.ring_dim]}: take a larger ring dimension, or fewer levels and more refreshes"
            )
        count = literal.levels + BASE_PRIMES
        bits = [literal.scale_bits] * count + [SPECIAL_BITS]
        *primes, special = (modulus.value() for modulus in seal().CoeffModulus.Create(literal.ring_dim, bits))
        order, scales = _order(primes, literal.levels)
        object.__setattr__(self, "moduli", (*order, special))
        object.__setattr__(self, "scales", tuple(scales))

    @property
    def ring_dim(self) -> int:
        return self.literal.ring_dim

    @property
    def security_bits(self) -> float:
        """Return the bits of security by the table in `hecompile.he.security`."""
        return security_bits(self.ring_dim, self.literal.modulus_bits, SIGMA)

    @property
    def slots(self) -> int:
        """Return how many independent values a ciphertext holds: sequences per batch."""
        return self.literal.ring_dim // 2

    @property
    def levels(self) -> int:
        return self.literal.levels

    @property
    def value_bound(self) -> float:
        """Return the size beyond which values wrap around at level 0."""
        return self.moduli[0] * self.moduli[1] / max(self.scales) / 4

    def primes(self, level: int) -> int:
        """Return how many moduli a ciphertext of this level has."""
        return level + BASE_PRIMES

    def ciphertext_bytes(self, level: int) -> int:
        """Return the bytes on the wire and in memory: two polynomials of 32-bit words."""
        return 2 * self.primes(level) * self.ring_dim * 4

    @property
    def evaluation_key_bytes(self) -> int:
        """Return the bytes on the wire: per prime but the special one, two polynomials of 32-bit words at all primes."""
        count = len(self.moduli)
        return 4 * (count - 1) * 2 * count * self.ring_dim

    def context(self) -> Any:
        """Make SEAL's context, which checks the security once more.

        Raises:
            SecurityError: SEAL refuses the parameters.
        """
        api = seal()
        parameters = api.EncryptionParameters(api.SCHEME_TYPE.CKKS)
        parameters.set_poly_modulus_degree(self.ring_dim)
        parameters.set_coeff_modulus([api.Modulus(value) for value in self.moduli])
        context = api.SEALContext(parameters, True, api.SEC_LEVEL_TYPE.TC128)
        if not context.parameters_set():
            raise SecurityError(f"SEAL refuses the parameters: {context.parameters_error_message()}")
        return context

    def fields(self) -> dict[str, int]:
        """Return the fields from which another party makes an equal object with `from_fields`."""
        return {name: getattr(self.literal, name) for name in ("ring_dim", "levels", "scale_bits")}

    @staticmethod
    def from_fields(fields: Any) -> CkksParameters:
        """Make the parameters that `fields` was called on.

        Raises:
            InputError: `fields` did not return this.
        """
        names = {"ring_dim", "levels", "scale_bits"}
        if not isinstance(fields, dict) or fields.keys() != names or any(type(v) is not int for v in fields.values()):
            raise InputError("CKKS parameters are the integers ring_dim, levels and scale_bits")
        if not all(0 < value < 1 << 20 for value in fields.values()):
            raise InputError("CKKS parameters are out of range")
        return CkksLiteral(**fields).validate()


def _order(primes: list[int], levels: int) -> tuple[list[int], list[float]]:
    """Return the order of the primes in which the scales stay nearest to where they start, and Δ_0 … Δ_L."""
    rest = sorted(primes)
    first = rest.pop(len(rest) // 2)
    chosen, scales = [first], [float(first)]
    for step in range(levels):
        prime = chosen[0] if step == 0 else min(rest, key=lambda q: abs(scales[0] ** 2 / q - first))
        if step:
            rest.remove(prime)
            chosen.insert(0, prime)
        scales.insert(0, scales[0] ** 2 / prime)
    if max(abs(scale / first - 1) for scale in scales) > 0.2:
        raise InputError(f"with {levels} levels of these primes the scales drift apart: take fewer levels")
    return [*rest, *chosen], scales


PRECISION = 16.0
"""Bits behind the binary point after one multiplication, by default."""


def smallest(levels: int, precision: float = PRECISION) -> CkksLiteral | None:
    """Find the smallest ring, and in it the largest scale, with at least `levels` levels and `precision` bits.

    The precision is in bits behind the binary point after one multiplication. Returns None when there is no set at 128 bits.
    """
    for ring_dim, most in MAX_MODULUS_BITS.items():
        for bits in range(MAX_SCALE_BITS, MIN_SCALE_BITS - 1, -1):
            literal = CkksLiteral(ring_dim, levels, bits)
            if literal.modulus_bits <= most and literal.error_bits >= precision:
                return literal
    return None


def select(levels: int, precision: float = PRECISION) -> CkksParameters:
    """Return what `smallest` finds, validated.

    Raises:
        InputError: there is no set at 128 bits; the message shows the numbers.
    """
    literal = smallest(levels, precision)
    if literal is not None:
        return literal.validate()
    ring_dim = max(MAX_MODULUS_BITS, key=lambda dim: (MAX_MODULUS_BITS[dim], -dim))
    bits = min(MAX_SCALE_BITS, max(MIN_SCALE_BITS, int(np.ceil(precision + np.log2(ring_dim / np.sqrt(18))))))
    needed, most = CkksLiteral(ring_dim, levels, bits), MAX_MODULUS_BITS[ring_dim]
    deepest = (most - SPECIAL_BITS) // bits - BASE_PRIMES
    raise InputError(
        f"no parameter set at {MINIMUM_BITS:.0f} bits ({COST_MODEL}) has {levels} levels and {precision:g} bits of "
        f"precision: ring dimension {ring_dim} allows a modulus of {most} bits, and they take {needed.modulus_bits} with "
        f"{needed.error_bits:.1f} bits of precision. At {bits} bits a level {deepest} levels fit: refresh more often"
    )
