"""Tell the bits of security of a lattice dimension, modulus and error width from estimated points, never from a fit.

Each entry is the minimum over the `usvp`, `bdd` and `dual_hybrid` attacks that the lattice-estimator
(https://github.com/malb/lattice-estimator, at HEAD; Albrecht, Player, Scott, "On the concrete hardness of Learning with
Errors", 2015) reports with the cost model MATZOV, classical, a uniform ternary secret, and unlimited samples. Other usual
models give for dimension 1536, q = 2^32, σ = 3.2 (161 bits here): ADPS16 135, BDGL16 165, and ChaLoy21, quantum, 120. The
bits that are left after many secrets, wherever they are stated, are under MATZOV; under ADPS16 they are 26 fewer.

Module-LWE and ring-LWE are counted as LWE at dimension ring_dim · rank: no attack is known that gains from these rings, the
cyclotomic ones of index 2^k and 9·2^k with secrets and errors small in the basis of powers (the second as in Lyubashevsky,
Seiler, "NTTRU", 2019).
"""

from __future__ import annotations

from dataclasses import dataclass

from hecompile.errors import SecurityError

MINIMUM_BITS = 128.0

COST_MODEL = "MATZOV, classical"
"""Cost model of lattice reduction in every estimate. Whatever prints bits of security names it (`show_bits`)."""

AMPLE_BITS = 160.0
"""Bits of one secret that are enough. All secrets of a bundle share A, and k of them cost log2 k bits: this leaves 128 bits
after 2^32, under MATZOV. More does not count as better."""


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
    # What the Homomorphic Encryption Standard's table of 2018 allows, or a little less, falls short in three of four rings.
    Estimate(4096, 109, 3.2, 125.1),
    Estimate(8192, 211, 3.2, 130.2),
    Estimate(16384, 423, 3.2, 130.6),
    Estimate(16384, 437, 3.2, 126.2),
    Estimate(32768, 872, 3.2, 127.3),
)


def show_bits(bits: float) -> str:
    """Write bits of security for people, with the cost model that they hold for."""
    return f"{bits:.0f} bits ({COST_MODEL})"


def largest_modulus_bits(lattice_dim: int, sigma: float) -> int:
    """Return log2 of the largest modulus at which the table vouches for MINIMUM_BITS, 0 where it does for none."""
    return max(
        (
            entry.log_q
            for entry in ESTIMATES
            if entry.bits >= MINIMUM_BITS and lattice_dim >= entry.lattice_dim and sigma >= entry.sigma
        ),
        default=0,
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
