"""Check what all clients of a sum agree on: security, the range of values, and room without overflow.

|x| ≤ `integer_bound` = ⌊(2^31 - 1 - noise_bound(K)) / K⌋ for K = max_clients, so the sum over any K clients
or fewer is within (-q/2, q/2). `noise_bound` adds the largest values of everything that is random or rounded; it holds
always, not with high probability.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hecompile.errors import FederationError, InputError, SecurityError
from hecompile.he.parameters import CATALOGUE, LOG_Q, RingParameters
from hecompile.he.random.sampling import ERROR_BOUND, SIGMA
from hecompile.he.ring import rounding_error_bound
from hecompile.he.security import MINIMUM_BITS, security_bits, show_bits

SAMPLES = 4
"""Number of samples of width SIGMA whose sum is a coordinate of a key or an error, of width √SAMPLES · SIGMA."""
SMALL_BOUND = SAMPLES * ERROR_BOUND
"""Largest absolute value of a coordinate of a key or an error."""
CLIENT_LIMIT = 128
"""Most clients: the sum of their keys must stay within half of the field that its shares live in
(`runtime/federation/protocol/shamir.py`)."""


@dataclass(frozen=True)
class AggregationParameters:
    """Hold what all clients of a sum agree on, validated.

    Args:
        max_clients: K, how many ciphertexts may be added.
        value_range: R > 0; encoded reals are at most that in absolute value.
        upload_bytes: 3 or 4, the bytes of a word of the ciphertext that are sent.
        ring: of the project's catalogue.

    Raises:
        InputError: a field is out of range.
        SecurityError: under 128 bits once the loss for K clients is taken off.
    """

    max_clients: int
    value_range: float
    upload_bytes: int = 3
    ring: RingParameters = CATALOGUE["2048x1"]

    def __post_init__(self) -> None:
        if not 2 <= self.max_clients <= CLIENT_LIMIT:
            raise InputError(f"a sum is over 2 to {CLIENT_LIMIT} clients, got max_clients {self.max_clients}")
        if not (math.isfinite(self.value_range) and self.value_range > 0):
            raise InputError(f"value_range must be a positive number, got {self.value_range}")
        if self.upload_bytes not in (3, 4):
            raise InputError(f"upload_bytes must be 3 or 4, got {self.upload_bytes}")
        if not self.ring.insecure and self.security_bits < MINIMUM_BITS:
            raise SecurityError(
                f"{self.ring.ring_dim} x {self.ring.rank} gives {show_bits(self.security_bits)} for sums over "
                f"{self.max_clients} clients, under {MINIMUM_BITS}: take a larger ring, e.g. 2048x1"
            )

    @property
    def security_bits(self) -> float:
        """Return the bits of the project's table at half the width of the secrets, less log2(max_clients); see `scheme`."""
        if self.ring.insecure:
            return 0.0
        width = math.sqrt(SAMPLES) * SIGMA / 2
        return security_bits(self.ring.lattice_dim, LOG_Q, width) - math.log2(self.max_clients)

    @property
    def step(self) -> int:
        """Return U, to whose multiples ciphertext words are rounded."""
        return 1 << (8 * (4 - self.upload_bytes))

    def noise_bound(self, clients: int) -> int:
        """Return the largest |opened - Σ x| that can occur over `clients` ciphertexts.

        Each adds its error, half a step of rounding and the error of its float64 product. The product with the sum of the
        keys adds the last of these once more. The products' bound is the ring's, times the norm of a key whose coordinates
        are all SMALL_BOUND over that of a ternary one; in practice they are exact.
        """
        product = math.floor(rounding_error_bound(self.ring) * SMALL_BOUND + 0.5)
        rounding = self.step // 2 if self.step > 1 else 0
        return clients * (SMALL_BOUND + rounding + 2 * product)

    @property
    def integer_bound(self) -> int:
        """Return the largest |x| of a coordinate that a client may encrypt: see above."""
        return (2 ** (LOG_Q - 1) - 1 - self.noise_bound(self.max_clients)) // self.max_clients

    @property
    def scale(self) -> float:
        """Return the integer steps per unit of a real value."""
        return self.integer_bound / self.value_range

    def value_error(self, clients: int) -> float:
        """Return the largest error of a sum of reals over `clients` clients: noise, and half a step of quantisation each."""
        return (self.noise_bound(clients) + 0.5 * clients) / self.scale

    def quantise(self, values: NDArray[np.float32] | NDArray[np.float64]) -> NDArray[np.int32]:
        """Turn reals into integers, rounded to nearest: int32 `[n]`.

        Raises:
            FederationError: a value is not finite, or beyond `value_range`.
        """
        flat = np.asarray(values).reshape(-1)
        largest = float(np.max(np.abs(flat))) if flat.size else 0.0
        if not math.isfinite(largest):
            raise FederationError(
                "the update holds values that are not finite; it was not encrypted. Lower the learning rate",
                public="its update holds values that are not finite",
            )
        if largest > self.value_range:
            raise FederationError(
                f"the update reaches {largest:.4g}, beyond the agreed range {self.value_range:g}: lower the learning "
                "rate or the local steps, or agree on a larger value_range",
                public="its update is beyond the agreed range",
            )
        return np.rint(flat.astype(np.float64) * self.scale).astype(np.int32)

    def to_reals(self, sums: NDArray[np.int64]) -> NDArray[np.float64]:
        """Turn opened sums of integers into sums of reals."""
        return sums / self.scale
