"""Give whole owners differential privacy: each clips its update and adds a share of the noise; the sum has all of it.

    share     x_k = round(Δ_k · min(1, C'/‖Δ_k‖) / g) + D_k,   D_k discrete Gaussian of SHARE_SIGMA steps, g the grid
    sum       Σ x_k·g = Σ clipped updates + noise of standard deviation σ·C·√(K / (m - c)) ≥ σ·C

K contributors, m the fewest that a sum may have, c who may give their own noise away: drop-outs and c betrayals leave at
least the noise that is accounted for. C' = C - g·√n/2 makes room for rounding, so that a rounded update is within C. Sums
of discrete Gaussians of this width are discrete Gaussians to within 2^-1000 (Kairouz, Liu, Steinke, "The distributed
discrete Gaussian mechanism", ICML 2021), and what the encryption adds only helps. Whoever sees the sum alone, the server
included, gets (ε, δ) of the Gaussian mechanism with noise multiplier σ per round: neighbours are the same federation with
one owner's update set to zero (that it took part is public). Sums of several rounds compose; every owner enters each
round in its own ledger before its contribution leaves it.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from hecompile.errors import FederationError
from hecompile.he.random.sampling import SecretRandom
from hecompile.runtime.federation.protocol.settings import Agreement, NoiseSection, noise_step
from hecompile.runtime.privacy.accountant import Mechanism
from hecompile.runtime.privacy.ledger import PrivacyLedger
from hecompile.runtime.privacy.noise import MULTIPLIERS, base_from_uniform

_PIECE = 1 << 16


def private_update(
    agreement: Agreement, number: int, delta: NDArray[np.float64], ledger: PrivacyLedger | None
) -> NDArray[np.float64]:
    """Clip, round and add noise: float64 `[n]`, multiples of the grid. The release is in the ledger when this returns.

    Raises:
        PrivacyError: the owner's budget does not allow for another round.
        FederationError: there is no ledger, or the grid is too coarse for the clip.
    """
    privacy = agreement.section.privacy
    assert privacy is not None
    if ledger is None:
        raise FederationError("a federation with differential privacy needs a ledger of each owner: give it a path")
    if not np.isfinite(delta).all():
        raise FederationError(
            "the update holds values that are not finite; nothing was released",
            public="its update holds values that are not finite",
        )
    integers = clip_to_grid(privacy, agreement.fewest, delta)
    ledger.spend(Mechanism(privacy.noise_multiplier, 1.0), note=f"round {number} of a federation")
    return (integers + share_of_noise(delta.size)) * noise_step(privacy, agreement.fewest)


def clip_to_grid(privacy: NoiseSection, fewest: int, delta: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the update in grid steps, of Euclidean norm at most clip / g: int64 `[n]`. Raises FederationError."""
    step = noise_step(privacy, fewest)
    bound = privacy.clip - step * math.sqrt(delta.size) / 2
    if bound < privacy.clip / 2:
        raise FederationError(
            f"noise multiplier {privacy.noise_multiplier:g} is too coarse a grid for {delta.size} "
            "coordinates: lower it, or prune"
        )
    norm = float(np.linalg.norm(delta))
    return np.rint(delta * (min(1.0, bound / norm) / step if norm > 0 else 0.0)).astype(np.int64)


def share_of_noise(count: int) -> NDArray[np.int64]:
    """Draw discrete Gaussians of SHARE_SIGMA steps from the operating system's generator: int64 `[count]`."""
    random, result = SecretRandom(), np.empty(count, dtype=np.int64)
    for start in range(0, count, _PIECE):
        piece = result[start : start + _PIECE]
        samples = base_from_uniform(4 * piece.size, random.uniform_bytes).reshape(4, piece.size)
        for z in MULTIPLIERS[:2]:
            samples = z * samples[0::2] + (z - 1) * samples[1::2]
        piece[:] = samples[0]
    return result
