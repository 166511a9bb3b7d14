"""Draw Gaussian noise for differential privacy: integers on a grid, from the operating system's generator, without floats.

A floating-point Gaussian is not Gaussian: which doubles it can reach, added to a gradient, depends on that gradient, and
that tells the two apart (Mironov, CCS 2012; Jin et al., arXiv 2112.05307). So nothing here is a float: gradients are cut to
multiples of a grid step (`hecompile.runtime.privacy.clipping`), the noise is a discrete Gaussian on the same grid
(Canonne, Kamath & Steinke, arXiv 2004.00010), and their sum is exact in int64.

The discrete Gaussian of standard deviation SIGMA_GRID, one fixed number, is put together from eight of standard deviation
20 by the convolution of Micciancio & Walter (CRYPTO 2017, eprint 2017/259, algorithm SampleI):

    s_0 = 20·√(2π);   z_i = ⌊s_{i-1} / (√2 η)⌋;   x_i = z_i·x + (z_i - 1)·x', with x and x' of level i - 1;
    s_i² = (z_i² + (z_i - 1)²) s_{i-1}²

η is the smoothing parameter of Z for 2^-100, η² = ln(2 (1 + 2^100)) / π; each level changes a probability by a factor within
1 ± 2^-97 or so. The base samples come from inverting a 128-bit cumulative table, cut at 13 standard deviations: statistical
distance below 2^-115 each. Over 10^7 parameters and 10^5 releases that is below 2^-70, far below any δ in use. Against the
continuous Gaussian that the accountant assumes, a coordinate's log-probability differs by at most
(t² + 1) / (24 SIGMA_GRID²) at t standard deviations, below 10^-15.

Sampling is by table look-up and not in constant time, as in `hecompile.he.random.sampling`, for the same reason.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from decimal import Decimal, localcontext
from functools import cache

import numpy as np
from numpy.typing import NDArray

from hecompile.errors import SecurityError
from hecompile.he.random.sampling import SecretRandom

Bytes = Callable[[int], NDArray[np.uint8]]
"""A source of that many uniform bytes."""

BASE_SIGMA = 20
_BOUND = 13 * BASE_SIGMA
_SMOOTHING = math.sqrt(math.log(2 * (1 + 2.0**100)) / math.pi)
_UNDECIDED = 32767
_PIECE = 1 << 16


def _levels() -> tuple[tuple[int, ...], float]:
    multipliers, width = [], BASE_SIGMA * math.sqrt(2 * math.pi)
    for _ in range(3):
        z = math.floor(width / (math.sqrt(2) * _SMOOTHING))
        multipliers.append(z)
        width *= math.hypot(z, z - 1)
    return tuple(multipliers), width / math.sqrt(2 * math.pi)


MULTIPLIERS, SIGMA_GRID = _levels()
"""The z of each level, and the standard deviation of the noise in grid steps, about 2^27."""


@cache
def base_cdf() -> tuple[int, ...]:
    """Tabulate 2^128 · P(e ≤ k) for k = -13·BASE_SIGMA … 13·BASE_SIGMA - 1, with P(e = k) ∝ exp(-k² / (2·BASE_SIGMA²))."""
    with localcontext() as context:
        context.prec = 80
        width = Decimal(2 * BASE_SIGMA**2)
        mass = [(-Decimal(k * k) / width).exp() for k in range(-_BOUND, _BOUND + 1)]
        total, below, steps = sum(mass), Decimal(0), []
        for part in mass[:-1]:
            below += part
            steps.append(int((below / total * 2**128).to_integral_value()))
    return tuple(steps)


@cache
def _tables() -> tuple[NDArray[np.int16], NDArray[np.uint64]]:
    """Tabulate the sample for each value of a number's top 16 bits, or _UNDECIDED; and the top 64 bits of the steps."""
    tops = np.array([step >> 64 for step in base_cdf()], dtype=np.uint64)
    low = np.arange(1 << 16, dtype=np.uint64) << np.uint64(48)
    first = np.searchsorted(tops, low, side="left")  # a step inside the cell or at its very beginning leaves it open
    last = np.searchsorted(tops, low + np.uint64((1 << 48) - 1), side="right")
    return np.where(first == last, first - _BOUND, _UNDECIDED).astype(np.int16), tops


def base_from_uniform(count: int, more: Bytes) -> NDArray[np.int64]:
    """Invert the cumulative table at `count` uniform numbers of 128 bits.

    Bits are drawn as far as they matter. Returns int64 `[count]`, each the number of steps that are at most the number, less
    13·BASE_SIGMA.
    """
    table, tops = _tables()
    top = more(2 * count).view(np.uint16)
    samples = table[top].astype(np.int64)
    (open_,) = np.nonzero(samples == _UNDECIDED)  # about one in 400
    if open_.size:
        rest = more(6 * open_.size).reshape(-1, 6).astype(np.uint64)
        value = top[open_].astype(np.uint64) << np.uint64(48)
        for byte in range(6):
            value |= rest[:, byte] << np.uint64(8 * byte)
        below = np.searchsorted(tops, value, side="right")
        samples[open_] = below - _BOUND
        for place in np.nonzero(tops[below - 1] == value)[0]:  # one in 2^55: the next 64 bits decide
            exact = int(value[place]) << 64 | int.from_bytes(more(8).tobytes(), "little")
            samples[open_[place]] = bisect_right(base_cdf(), exact) - _BOUND
    return samples


def combine(samples: NDArray[np.int64]) -> NDArray[np.int64]:
    """Convolve samples of level 0, int64 `[8, n]`, into samples of standard deviation SIGMA_GRID, int64 `[n]`."""
    for z in MULTIPLIERS:
        samples = z * samples[0::2] + (z - 1) * samples[1::2]
    return samples[0]


def discrete_gaussian(count: int, random: SecretRandom | None = None) -> NDArray[np.int64]:
    """Draw secret samples of the discrete Gaussian of standard deviation SIGMA_GRID: int64 `[count]`, |x| < 2^34.

    Raises SecurityError for anything but `SecretRandom`: noise that could be drawn again could be taken off again.
    """
    random = SecretRandom() if random is None else random
    if type(random) is not SecretRandom:
        raise SecurityError("privacy noise is drawn from SecretRandom, never from a seed or a public stream")
    result = np.empty(count, dtype=np.int64)
    for start in range(0, count, _PIECE):
        piece = result[start : start + _PIECE]
        size = 1 << len(MULTIPLIERS)
        piece[:] = combine(base_from_uniform(size * piece.size, random.uniform_bytes).reshape(size, piece.size))
    return result
