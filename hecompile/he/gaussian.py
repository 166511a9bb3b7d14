"""The discrete Gaussian: its table, and the inversion that turns uniform bits into samples. No randomness of its own."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal, localcontext
from functools import cache

import numba
import numpy as np
from numpy.typing import NDArray

from hecompile.he import bytewise
from hecompile.he.scratch import scratch
from hecompile.he.simd import address

SIGMA = 3.2
"""Standard deviation of the error."""

ERROR_BOUND = 29
"""Largest |e| that is ever drawn. The mass beyond it is 2^-65.3, and cutting it makes the noise bound deterministic."""

_STRADDLES = 127
"""Marks a table cell in which the sample is not decided by its top bits; beyond ERROR_BOUND, so no sample."""

_LANES = bytewise.LANES
_BLOCK = 1 << 15
"""Samples whose open places are listed before they are looked at."""


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

    At 16 bits 28 cells straddle, so about one sample in 2300 needs more.
    """
    width = 64 - bits
    low = np.arange(1 << bits, dtype=np.uint64) << np.uint64(width)
    first = np.searchsorted(gaussian_cdf(), low, side="right")
    last = np.searchsorted(gaussian_cdf(), low + np.uint64(2**width - 1), side="right")
    return np.where(first == last, first - ERROR_BOUND, _STRADDLES).astype(np.int8)


@cache
def step_tables() -> NDArray[np.uint8]:
    """For each top byte: the sample before the step of the CDF in its cell, and the step's next byte: uint8 `[2, 256]`.

    The sample (as int8) is the first one if the second byte of u is below the step's, one more if it is above, and
    undecided if they are equal. A cell with several steps, which are those of the tails, has _STRADDLES. About one sample in
    90 is left open.
    """
    fine = gaussian_table(16).reshape(256, 256)
    before, step = np.full(256, _STRADDLES, dtype=np.int8), np.full(256, 255, dtype=np.uint8)
    for cell, row in enumerate(fine):
        place = int(np.argmax(row == _STRADDLES)) if _STRADDLES in row else 255
        first = int(row[0]) if place > 0 else int(row[1]) - 1
        if (row[:place] == first).all() and (row[place + 1 :] == first + 1).all():
            before[cell], step[cell] = first, place  # at 255 without a step the last of the cell is left open, harmlessly
    return np.stack([before.view(np.uint8), step])


def gaussian_from_uniform(
    top: NDArray[np.uint8],
    more_bytes: Callable[[int], bytes | NDArray[np.uint8]],
    out: NDArray[np.int8] | None = None,
) -> NDArray[np.int8]:
    """Inverts the 64-bit CDF at uniform numbers given by their top 16 bits, drawing the other 48 where they matter.

    Args:
        top: uniform uint8, flat `[2, n]`: the top byte of each number, then the second byte of each.
        more_bytes: returns that many uniform bytes; asked once, for 6 bytes per undecided sample.
        out: int8 `[n]`, to be filled and returned.

    Returns:
        int8 `[n]`: the smallest k with u < 2^64 · P(e ≤ k).
    """
    count = top.size // 2
    samples = np.empty(count, dtype=np.int8) if out is None else out
    undecided = scratch("undecided", count, np.uint32)
    done, left_open = 0, 0
    if bytewise.supported():
        done = count // _LANES * _LANES
        places = scratch("places", _BLOCK + _LANES, np.uint16)
        left_open = _look_up_vectors(top, step_tables().ravel(), gaussian_table(16), samples, places, undecided)
    left_open = _look_up(top, done, gaussian_table(16), samples, undecided, left_open)
    if left_open:
        tail = np.frombuffer(more_bytes(6 * left_open), dtype=np.uint8)
        _decide(top, undecided[:left_open], tail, gaussian_cdf(), samples)
    return samples


@numba.njit(nogil=True, cache=True, boundscheck=False)
def _look_up_vectors(top, steps, fine, samples, places, undecided):  # type: ignore[no-untyped-def]
    """Fills all of `samples` that is whole vectors; the places left open go to `undecided`, their number is returned."""
    half, left_open = top.size // 2, 0
    steps_, places_ = address(steps), address(places)
    top_, samples_ = address(top), address(samples)
    for start in range(0, half - _LANES + 1, _BLOCK):
        count = 0
        for i in range(start, min(start + _BLOCK, half) - _LANES + 1, _LANES):
            count += bytewise.step_sample(
                top_ + i, top_ + half + i, steps_, samples_ + i, i - start, places_ + 2 * count
            )
        for c in range(count):
            k = start + np.int64(places[c])
            sample = fine[(np.int64(top[k]) << 8) | np.int64(top[half + k])]
            samples[k] = sample
            if sample == _STRADDLES:
                undecided[left_open] = k
                left_open += 1
    return left_open


@numba.njit(nogil=True, cache=True, boundscheck=False)
def _look_up(top, start, fine, samples, undecided, left_open):  # type: ignore[no-untyped-def]
    """The same from place `start` on, by table alone."""
    half = top.size // 2
    for i in range(start, half):
        sample = fine[(np.int64(top[i]) << 8) | np.int64(top[half + i])]
        samples[i] = sample
        if sample == _STRADDLES:
            undecided[left_open] = i
            left_open += 1
    return left_open


@numba.njit(nogil=True, cache=True, boundscheck=False)
def _decide(top, undecided, tail, cdf, samples):  # type: ignore[no-untyped-def]
    """Fills the open places with the number of steps of the CDF that are at most u, of which `tail` has the low 6 bytes."""
    half = top.size // 2
    for k in range(undecided.size):
        i = undecided[k]
        u = (np.uint64(top[i]) << np.uint64(56)) | (np.uint64(top[half + i]) << np.uint64(48))
        for byte in range(6):
            u |= np.uint64(tail[6 * k + byte]) << np.uint64(8 * byte)
        steps = 0
        while steps < cdf.size and cdf[steps] <= u:
            steps += 1
        samples[i] = steps - ERROR_BOUND
