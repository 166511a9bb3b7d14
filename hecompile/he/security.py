"""Tell the bits of security of a lattice dimension, modulus and error width from estimated points, never from a fit.

Each entry is the minimum over the `usvp`, `bdd` and `dual_hybrid` attacks that the lattice-estimator
(https://github.com/malb/lattice-estimator, at HEAD; Albrecht, Player, Scott, "On the concrete hardness of Learning with
Errors", 2015) reports with classical cost models, a uniform ternary secret, and unlimited samples. Module-LWE and ring-LWE
are counted as LWE at dimension ring_dim · rank: no attack is known that gains from these rings, the cyclotomic ones of index
2^k and 9·2^k with secrets and errors small in the basis of powers (the second as in Lyubashevsky, Seiler, "NTTRU", 2019).
"""

from __future__ import annotations

from dataclasses import dataclass

from hecompile.errors import SecurityError

MINIMUM_BITS = 128.0

AMPLE_BITS = 160.0
"""Bits of one secret that are enough. All secrets of a bundle share A, and k of them cost log2 k bits: this leaves 128 bits
after 2^32. More does not count as better."""


@dataclass(frozen=True)
class Estimate:
    """Record one estimate: LWE with dimension `lattice_dim`, modulus 2^`log_q` and error standard deviation `sigma`."""

    lattice_dim: int
    log_q: int
    sigma: float
    bits: float


ESTIMATES: tuple[Estimate, ...] = (
    Estimate(1024, 24, 3.19, 142.0),
    Estimate(1024, 32, 64.0, 123.0),
    Estimate(1024, 32, 128.0, 127.8),
    Estimate(1248, 32, 3.19, 129.9),
    Estimate(1280, 32, 3.19, 133.7),
    Estimate(1536, 32, 3.19, 161.0),
    Estimate(1536, 40, 3.19, 127.8),
    Estimate(2048, 32, 3.19, 218.0),
    Estimate(2048, 48, 3.19, 142.0),
)


def security_bits(lattice_dim: int, log_q: int, sigma: float) -> float:
    """Return the bits of security that the table vouches for.

    Hardness grows with the dimension and the error and falls with the modulus. So a point is at least as hard as every entry
    that it dominates (dimension and sigma no smaller, modulus no larger). The best of those is returned.

    Raises:
        SecurityError: the point dominates no entry, so nothing is known about it.
    """
    dominated = [
        entry.bits
        for entry in ESTIMATES
        if lattice_dim >= entry.lattice_dim and log_q <= entry.log_q and sigma >= entry.sigma
    ]
    if not dominated:
        raise SecurityError(
            f"no security estimate covers lattice dimension {lattice_dim}, q = 2^{log_q}, sigma = {sigma}: "
            "take a larger ring_dim * rank, a smaller modulus or a larger sigma"
        )
    return max(dominated)
