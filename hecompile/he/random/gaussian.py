"""Invert the table of the discrete Gaussian: turn uniform bits into samples. There is no randomness here."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal, localcontext
from functools import cache

import numpy as np
from numpy.typing import NDArray

from hecompile.errors import SecurityError
from hecompile.he.kernels.jit import compiled
from hecompile.he.kernels.scratch import scratch
from hecompile.he.kernels.vectors import address
from hecompile.he.random import table_comparison, table_lookup

SIGMA = 3.2
"""Standard deviation of the error."""

ERROR_BOUND = 29
"""Largest |e| that is ever drawn. The mass beyond it is 2^-65.3; cutting it makes the noise bound deterministic."""

_STRADDLES = 127
"""Mark of a table cell in which the top bits do not decide the sample; beyond ERROR_BOUND, so no sample."""

_NO_STEP = 255
"""Mark, in the place of a step's second byte, of a cell without a step."""

_LANES = table_lookup.LANES
_BLOCK = 1 << 15
"""Samples whose undecided places are listed before they are looked up."""


@cache
def gaussian_cdf() -> NDArray[np.uint64]:
    """Return 2^64 · P(e ≤ k) for k = -ERROR_BOUND … ERROR_BOUND - 1, rounded to nearest: uint64 `[2 · ERROR_BOUND]`.

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
    """Return the sample for each value of the top `bits` bits, _STRADDLES where a step of the CDF lies inside: int8.

    At 16 bits 28 cells straddle, so about one sample in 2300 needs more.
    """
    width = 64 - bits
    low = np.arange(1 << bits, dtype=np.uint64) << np.uint64(width)
    first = np.searchsorted(gaussian_cdf(), low, side="right")
    last = np.searchsorted(gaussian_cdf(), low + np.uint64(2**width - 1), side="right")
    return np.where(first == last, first - ERROR_BOUND, _STRADDLES).astype(np.int8)


@cache
def step_tables() -> NDArray[np.uint8]:
    """Return for each top byte the sample before its cell's step of the CDF, and the step's next byte: uint8 `[2, 256]`.

    The sample (as int8) holds if the second byte of u is below the step's. It is one more if that is above, and undecided
    if they are equal. The step's byte is 255 in a cell without a step: then the second byte does not matter. A cell with
    several steps, which are those of the tails, has _STRADDLES. So a second byte is wanted in 18 of 256 cells, and about
    one sample in 120 stays undecided.
    """
    fine = gaussian_table(16).reshape(256, 256)
    before, step = np.full(256, _STRADDLES, dtype=np.int8), np.full(256, _NO_STEP, dtype=np.uint8)
    for cell, row in enumerate(fine):
        if _STRADDLES not in row:
            before[cell] = row[0]
            continue
        place = int(np.argmax(row == _STRADDLES))
        first = int(row[0]) if place > 0 else int(row[1]) - 1
        if place < _NO_STEP and (row[:place] == first).all() and (row[place + 1 :] == first + 1).all():
            before[cell], step[cell] = first, place
    return np.stack([before.view(np.uint8), step])


@cache
def wants_second() -> NDArray[np.bool_]:
    """Return for each top byte whether the second byte of u matters: bool `[256]`."""
    before, step = step_tables()
    return (before == _STRADDLES) | (step != _NO_STEP)


def second_bytes(count: int) -> int:
    """Return how many second bytes to hold ready for `count` samples.

    7 % of the samples want one. More than this are wanted with probability below 2^-200 (Chernoff: a sum of mean 0.0703·n
    exceeds 0.125·n + 1024 with probability below exp(-0.017·n - 590)).
    """
    return min(count, count // 8 + 1024) + _LANES


def tail_bytes(count: int) -> int:
    """Return how many of the remaining bytes to hold ready: 6 each for one sample in 1024, and for 16 more.

    One sample in 2300 wants them. Where these are too few, more are drawn.
    """
    return 6 * (count // 1024 + 16)


def gaussian_from_uniform(
    top: NDArray[np.uint8],
    second: NDArray[np.uint8],
    more_bytes: Callable[[int], bytes | NDArray[np.uint8]],
    out: NDArray[np.int8] | None = None,
) -> NDArray[np.int8]:
    """Invert the 64-bit CDF at uniform numbers given by their top byte; the other 56 bits are drawn where they matter.

    Args:
        top: uniform uint8 `[n]`: the top byte of each number.
        second: uniform uint8, `second_bytes(n)` of them: the second byte of those numbers whose top byte `wants_second`, in
            order; the others have none.
        more_bytes: returns that many uniform bytes; called once at most, for 6 bytes per undecided sample.
        out: int8 `[n]`, to be filled and returned.

    Returns:
        int8 `[n]`: the smallest k with u < 2^64 · P(e ≤ k).

    Raises:
        SecurityError: there are too few second bytes. (A byte that served two samples would correlate them.)
    """
    count = top.size
    samples = np.empty(count, dtype=np.int8) if out is None else out
    low, undecided = scratch("low", count, np.uint8), scratch("undecided", count, np.uint32)
    done, used, left_open = 0, 0, 0
    tables, fine, wanted = step_tables().ravel(), gaussian_table(16), wants_second()
    if table_lookup.supported() and count >= _LANES:
        done = count // _LANES * _LANES
        places = scratch("places", _BLOCK + _LANES, np.uint16)
        used, left_open = _look_up_vectors(top, second, tables, fine, samples, low, places, undecided)
    elif count >= _LANES:
        done = count // _LANES * _LANES
        used, left_open = _compare_vectors(top, second, fine, samples, low, undecided)
    if done < count:
        used, left_open = _look_up(top, second, done, used, wanted, tables, fine, samples, low, undecided, left_open)
    if used > second.size:
        raise SecurityError("too few random bytes were drawn for the errors: this is a defect, please report it")
    if left_open:
        tail = np.frombuffer(more_bytes(6 * left_open), dtype=np.uint8)
        _decide(top, low, undecided[:left_open], tail, gaussian_cdf(), samples)
    return samples


@compiled
def _look_up_vectors(top, second, steps, fine, samples, low, places, undecided):  # type: ignore[no-untyped-def]
    """Fill the whole vectors of `samples` and `low`, and list the undecided places in `undecided`.

    Returns how many bytes of `second` were used (more than there are if it has too few), and the number of undecided places.
    """
    used, left_open = 0, 0
    steps_, places_, second_ = address(steps), address(places), address(second)
    top_, samples_, low_ = address(top), address(samples), address(low)
    for start in range(0, top.size - _LANES + 1, _BLOCK):
        count = 0
        for i in range(start, min(start + _BLOCK, top.size) - _LANES + 1, _LANES):
            if used + _LANES > second.size:
                return second.size + 1, 0
            result = table_lookup.step_sample(
                top_ + i, second_ + used, steps_, samples_ + i, low_ + i, i - start, places_ + 2 * count
            )
            count += result & 0xFFFFFFFF
            used += result >> 32
        for c in range(count):
            k = start + np.int64(places[c])
            sample = fine[(np.int64(top[k]) << 8) | np.int64(low[k])]
            samples[k] = sample
            if sample == _STRADDLES:
                undecided[left_open] = k
                left_open += 1
    return used, left_open


_top_byte_samples = table_comparison.top_byte_samples(step_tables()[0].view(np.int8).tolist(), wants_second().tolist())


@compiled
def _compare_vectors(top, second, fine, samples, low, undecided):  # type: ignore[no-untyped-def]
    """Run `_look_up_vectors` where the processor lacks the instructions of `table_lookup`.

    The last lines stand in `_look_up_vectors` too. As a function of their own they took half as long again as all of this,
    for numba counts references to arrays that are passed on.
    """
    used, left_open = 0, 0
    top_, samples_ = address(top), address(samples)
    for i in range(0, top.size - _LANES + 1, _LANES):
        if used + _LANES > second.size:
            return second.size + 1, 0
        mask = _top_byte_samples(top_ + i, samples_ + i)
        while mask != 0:
            k = i + table_comparison.lowest_bit(mask)
            mask &= mask - 1
            low[k] = second[used]
            used += 1
            sample = fine[(np.int64(top[k]) << 8) | np.int64(low[k])]
            samples[k] = sample
            if sample == _STRADDLES:
                undecided[left_open] = k
                left_open += 1
    return used, left_open


@compiled
def _look_up(top, second, start, used, wanted, steps, fine, samples, low, undecided, left_open):  # type: ignore[no-untyped-def]
    """Fill places from `start` on, one by one, as `_look_up_vectors` does."""
    for i in range(start, top.size):
        high = np.int64(top[i])
        if not wanted[high]:
            samples[i] = np.int8(steps[high])
            continue
        if used >= second.size:
            return second.size + 1, 0
        low[i] = second[used]
        used += 1
        sample = fine[(high << 8) | np.int64(low[i])]
        samples[i] = sample
        if sample == _STRADDLES:
            undecided[left_open] = i
            left_open += 1
    return used, left_open


@compiled
def _decide(top, low, undecided, tail, cdf, samples):  # type: ignore[no-untyped-def]
    """Fill the undecided places by the number of steps of the CDF that are at most u; `tail` has the low 6 bytes of u."""
    for k in range(undecided.size):
        i = undecided[k]
        u = (np.uint64(top[i]) << np.uint64(56)) | (np.uint64(low[i]) << np.uint64(48))
        for byte in range(6):
            u |= np.uint64(tail[6 * k + byte]) << np.uint64(8 * byte)
        steps = 0
        while steps < cdf.size and cdf[steps] <= u:
            steps += 1
        samples[i] = steps - ERROR_BOUND
