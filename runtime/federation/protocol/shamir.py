"""Share secret integer vectors by Shamir's scheme, coordinate by coordinate, over the field of 65521 elements.

    share     f(X) = s + c_1·X + … + c_(t-1)·X^(t-1),  c uniform;  participant j = 1 … n gets f(j)
    combine   s = Σ_j λ_j·f(j) over any t participants, λ_j = Π_(i≠j) i / (i - j)

(Shamir, "How to share a secret", CACM 1979.) Sharing is linear: sums of shares are shares of the sum, with sums of
polynomials, and fewer than t of them are independent of it. Secrets are small integers, read centred: a sum of keys of up
to 128 clients is at most 128 · 116 = 14848 in absolute value, and 65521 / 2 is more than twice that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hecompile.errors import FederationError, InputError
from hecompile.he.random.sampling import SecretRandom

PRIME = 65521
"""The largest below 2^16: a share of a coordinate is two bytes."""


def share(secret: NDArray[np.int32], threshold: int, count: int, random: SecretRandom) -> NDArray[np.uint16]:
    """Draw shares of `secret [m]` for participants 1 … count, any `threshold` of which determine it: uint16 `[count, m]`.

    Raises InputError where 1 ≤ threshold ≤ count < PRIME does not hold or a coordinate is beyond PRIME / 2.
    """
    if not 1 <= threshold <= count < PRIME:
        raise InputError(f"a threshold of {threshold} among {count} participants is impossible")
    if secret.size and max(-int(secret.min()), int(secret.max())) > PRIME // 2:
        raise InputError(f"a shared integer is at most {PRIME // 2} in absolute value")
    coefficients = random.below(PRIME, (threshold - 1) * secret.size).reshape(threshold - 1, secret.size)
    return _share_with(secret, coefficients, count)


def _share_with(secret: NDArray[np.int32], coefficients: NDArray[np.int64], count: int) -> NDArray[np.uint16]:
    """Evaluate the polynomials, without randomness: coefficients int64 `[threshold - 1, m]`, lowest degree first."""
    points = np.arange(1, count + 1, dtype=np.int64)[:, None]  # [count, 1]
    values = np.zeros((count, secret.size), dtype=np.int64)
    for row in coefficients[::-1]:  # Horner
        values = (values + row) * points % PRIME
    return ((values + secret) % PRIME).astype(np.uint16)


def add(shares: Sequence[NDArray[np.uint16]]) -> NDArray[np.uint16]:
    """Add one participant's shares of several secrets to its share of their sum: uint16 `[m]`."""
    total = np.zeros(len(shares[0]), dtype=np.int64)
    for one in shares:
        total += one
    return (total % PRIME).astype(np.uint16)


def combine(shares: dict[int, NDArray[np.uint16]], threshold: int) -> NDArray[np.int64]:
    """Open the secret, centred, from shares `[m]` by participant: int64 `[m]`.

    More shares than the threshold are checked against the polynomial of the first ones: the redundancy of a Reed-Solomon
    code, which shows any number of wrong shares up to the surplus.

    Raises:
        FederationError: too few shares, one that is no field element, or one that contradicts the others.
    """
    if len(shares) < threshold:
        raise FederationError(f"{len(shares)} shares, but it takes {threshold} to open")
    if any(int(row.max(initial=0)) >= PRIME for row in shares.values()):
        raise FederationError("a share is no vector of field elements")
    points = sorted(shares)
    basis, surplus = points[:threshold], points[threshold:]
    rows = np.stack([shares[point] for point in basis]).astype(np.int64)  # [t, m]
    for point in surplus:
        if not np.array_equal(_interpolate(basis, rows, point), shares[point].astype(np.int64)):
            raise FederationError("the shares contradict each other: one or more of them were forged or damaged")
    value = _interpolate(basis, rows, 0)
    return np.where(value > PRIME // 2, value - PRIME, value)


def _interpolate(points: Sequence[int], rows: NDArray[np.int64], at: int) -> NDArray[np.int64]:
    """Evaluate at `at` the polynomials through `rows [t, m]` at `points`: int64 `[m]`, in [0, PRIME)."""
    total = np.zeros(rows.shape[1], dtype=np.int64)
    for index, point in enumerate(points):
        numerator = denominator = 1
        for other in points:
            if other != point:
                numerator = numerator * (at - other) % PRIME
                denominator = denominator * (point - other) % PRIME
        total += rows[index] * (numerator * pow(denominator, -1, PRIME) % PRIME)  # below 128 · 2^32
    return total % PRIME
