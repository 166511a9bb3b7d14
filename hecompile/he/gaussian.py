"""The discrete Gaussian: its table, and the inversion that turns uniform bits into samples. No randomness of its own."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal, localcontext
from functools import cache

import numba
import numpy as np
from numpy.typing import NDArray

from hecompile.he.scratch import scratch

SIGMA = 3.2
"""Standard deviation of the error."""

ERROR_BOUND = 29
"""Largest |e| that is ever drawn. The mass beyond it is 2^-65.3, and cutting it makes the noise bound deterministic."""

_STRADDLES = 127
"""Marks a table cell in which the sample is not decided by its top bits; beyond ERROR_BOUND, so no sample."""


@cache
def gaussian_cdf() -> NDArray[np.uint64]:
    """2^64 · P(e ≤ k) for k = -ERROR_BOUND … ERROR_BOUND - 1, rounded to nearest: uint64 `[2 · ERROR_BOUND]`.

    P(e = k) is proportional to exp(-k² / (2 σ²)). A step is off by at most 2^-65, so a sample is within statistical
    distance 2^-58 of the exact distribution. (Inversion by a cumulative table: Peikert, "An efficient and parallel
    Gaussian sampler for lattices", CRYPTO 2010, section 4.1.)
    """
    with localcontext() as context:
        context.prec = 50
        width = 2 * Decimal(str(SIGMA)) ** 2
        mass = [(-(Decimal(k) ** 2) / width).exp() for k in range(-ERROR_BOUND, ERROR_BOUND + 1)]
        total, below, steps = sum(mass), Decimal(0), []
        for part in mass[:-1]:
            below += part
            steps.append(int((below / total * 2**64).to_integral_value()))  # the last one is 2^64 - 3
    return np.array(steps, dtype=np.uint64)


@cache
def gaussian_table(bits: int) -> NDArray[np.int8]:
    """The sample for each value of the top `bits` bits, or _STRADDLES where a step of the CDF lies inside: int8 `[2^bits]`.

    At 16 bits 28 cells straddle, so about one sample in 2300 needs more; at 12 bits one in 150, but the table fits the
    first-level cache.
    """
    width = 64 - bits
    low = np.arange(1 << bits, dtype=np.uint64) << np.uint64(width)
    first = np.searchsorted(gaussian_cdf(), low, side="right")
    last = np.searchsorted(gaussian_cdf(), low + np.uint64(2**width - 1), side="right")
    return np.where(first == last, first - ERROR_BOUND, _STRADDLES).astype(np.int8)


def gaussian_from_uniform(
    top: NDArray[np.uint16],
    more_bytes: Callable[[int], bytes | NDArray[np.uint8]],
    out: NDArray[np.int8] | None = None,
) -> NDArray[np.int8]:
    """Inverts the 64-bit CDF at uniform numbers given by their top 16 bits, drawing the other 48 where they matter.

    Args:
        top: uniform uint16 `[n]`.
        more_bytes: returns that many uniform bytes; asked once, for 6 bytes per undecided sample.
        out: int8 `[n]`, to be filled and returned.

    Returns:
        int8 `[n]`: the smallest k with u < 2^64 · P(e ≤ k).
    """
    samples = np.empty(top.shape, dtype=np.int8) if out is None else out
    undecided = scratch("undecided", top.size, np.uint32)
    count = _look_up(top, gaussian_table(12), gaussian_table(16), samples, undecided)
    if count:
        tail = np.frombuffer(more_bytes(6 * count), dtype=np.uint8)
        _decide(top, undecided[:count], tail, gaussian_cdf(), samples)
    return samples


@numba.njit(nogil=True, cache=True, boundscheck=False)
def _look_up(top, coarse, fine, samples, undecided):  # type: ignore[no-untyped-def]
    """Fills `samples` from the tables; the places left open go to `undecided`, and their number is returned."""
    count = 0
    for i in range(top.size):
        sample = coarse[top[i] >> 4]
        if sample == _STRADDLES:
            sample = fine[top[i]]
            if sample == _STRADDLES:
                undecided[count] = i
                count += 1
        samples[i] = sample
    return count


@numba.njit(nogil=True, cache=True, boundscheck=False)
def _decide(top, undecided, tail, cdf, samples):  # type: ignore[no-untyped-def]
    """Fills the open places with the number of steps of the CDF that are at most u, of which `tail` has the low 6 bytes."""
    for k in range(undecided.size):
        i = undecided[k]
        u = np.uint64(top[i]) << np.uint64(48)
        for byte in range(6):
            u |= np.uint64(tail[6 * k + byte]) << np.uint64(8 * byte)
        steps = 0
        while steps < cdf.size and cdf[steps] <= u:
            steps += 1
        samples[i] = steps - ERROR_BOUND
