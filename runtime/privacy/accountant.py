"""Compute how much privacy releases cost together, by dp-accounting's privacy loss distributions.

(Koskela et al., arXiv 1906.03049; Doroshenko et al., arXiv 2207.04380.) The result is tight up to a discretisation that errs
on the safe side. The neighbouring relation is adding or removing one example; each release is a Gaussian on a Poisson
sample. Everything here is a function of its arguments: what was released, `ledger` knows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from scipy.optimize import brentq

from hecompile.errors import InputError
from hecompile.extras import install_command

SMALLEST_NOISE, LARGEST_NOISE = 0.1, 1e5
"""Bounds of a noise multiplier other than 0: below, it promises nothing; above, no gradient is left."""
_TOLERANCE = 1e-3
"""Error of a calibrated noise multiplier, to the safe side."""
_DISCRETIZATION = 5e-4
"""Step of privacy losses: five times dp-accounting's default, in a fifth of its time.

ε grows by 1.3e-4 of itself or less for up to 10^4 releases (measured), and is never too small (the discretisation is
pessimistic)."""
_COARSE = 2e-3
"""Step of privacy losses while a noise is looked for: four times faster again, and at most 0.2 % more pessimistic."""


@dataclass(frozen=True)
class Mechanism:
    """Describe a release: Gaussian noise of `noise_multiplier` sensitivities on a Poisson sample of rate `sampling_rate`."""

    noise_multiplier: float
    sampling_rate: float

    def __post_init__(self) -> None:
        if not 0 < self.sampling_rate <= 1:
            raise InputError(f"the sampling rate is {self.sampling_rate:g}; it must be in (0, 1]")
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise InputError(f"the noise multiplier is {self.noise_multiplier:g}; it must be finite and not negative")


History = Sequence[tuple[Mechanism, int]]
"""Releases in any order: each mechanism with how often."""


def without_sampling(history: History) -> History:
    """Return the releases with a sampling rate of 1: to somebody who knows who was in each sample, that is what they are."""
    return [(Mechanism(mechanism.noise_multiplier, 1.0), count) for mechanism, count in history]


def check_delta(delta: float, examples: int | None = None) -> None:
    """Raise InputError unless 0 < δ < 1/N: at 1/N, publishing one example in full at random would pass for private."""
    if not 0 < delta < 1:
        raise InputError(f"delta is {delta:g}; it must lie between 0 and 1")
    if examples is not None and delta >= 1 / examples:
        raise InputError(
            f"delta is {delta:g}, but with {examples} examples it must be below 1/{examples} = {1 / examples:.3g}, or "
            f"publishing one example in full would count as private; try {0.1 / examples:.1g}"
        )


def spent_epsilon(history: History, delta: float) -> float:
    """Return the ε of all releases together at `delta`; 0 for none, infinity where one had no noise."""
    check_delta(delta)
    return _epsilon(tuple((mechanism, count) for mechanism, count in history if count), delta, _DISCRETIZATION)


@lru_cache(maxsize=256)
def _epsilon(history: tuple[tuple[Mechanism, int], ...], delta: float, discretization: float) -> float:
    if not history:
        return 0.0
    if not all(mechanism.noise_multiplier for mechanism, _ in history):
        return math.inf
    accountant = _fresh(discretization)
    for mechanism, count in history:
        accountant.compose(_event(mechanism, count))
    return float(accountant.get_epsilon(delta))


def calibrate_noise(epsilon: float, delta: float, sampling_rate: float, releases: int, history: History = ()) -> float:
    """Return the smallest noise multiplier with which `releases` more stay within (ε, δ) together with `history`.

    It is within 1e-3 and 0.2 %, to the safe side, and at least SMALLEST_NOISE. Raises InputError where the history leaves
    nothing, or no noise is enough.
    """
    check_epsilon(epsilon)
    before = spent_epsilon(history, delta)
    if before >= epsilon:
        raise InputError(
            f"the privacy budget epsilon {epsilon:g} (delta {delta:g}) is spent: releases so far cost {before:.4g}; raise "
            f"epsilon above that, which promises less, or train on other data"
        )

    def gap(noise: float, discretization: float = _COARSE) -> float:
        return _epsilon((*history, (Mechanism(noise, sampling_rate), releases)), delta, discretization) - epsilon

    high = 1.0
    while gap(high) > 0:
        high *= 2
        if high > LARGEST_NOISE:
            raise InputError(
                f"no noise gives epsilon {epsilon:g} at delta {delta:g} for {releases} releases at sampling rate "
                f"{sampling_rate:.3g} on top of the {before:.4g} already spent; raise epsilon or take fewer steps"
            )
    low = high / 2
    while gap(low) <= 0:
        if low <= SMALLEST_NOISE:
            return SMALLEST_NOISE
        low, high = max(low / 2, SMALLEST_NOISE), low
    noise = float(brentq(gap, low, high, xtol=_TOLERANCE / 2, rtol=_TOLERANCE / 4))
    while gap(noise, _DISCRETIZATION) > 0:
        noise += _TOLERANCE / 4
    return noise


def affordable(epsilon: float, delta: float, mechanism: Mechanism, history: History = (), most: int = 1 << 20) -> int:
    """Count how many more releases of `mechanism` fit into (ε, δ) after `history`, at most `most`. Bisects: ε only grows."""

    def fits(count: int) -> bool:
        return spent_epsilon([*history, (mechanism, count)], delta) <= epsilon

    low, high = 0, min(most, 64)
    while fits(high):
        if high == most:
            return most
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def check_epsilon(epsilon: float) -> None:
    """Raise InputError unless it is finite and positive."""
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise InputError(f"epsilon is {epsilon:g}; a promise needs a finite one above 0")


def _event(mechanism: Mechanism, count: int) -> Any:
    accounting = _dp_accounting()
    gaussian = accounting.GaussianDpEvent(mechanism.noise_multiplier)
    if mechanism.sampling_rate == 1:
        return accounting.SelfComposedDpEvent(gaussian, count)
    return accounting.SelfComposedDpEvent(accounting.PoissonSampledDpEvent(mechanism.sampling_rate, gaussian), count)


def _fresh(discretization: float) -> Any:
    _dp_accounting()
    from dp_accounting.pld import PLDAccountant

    return PLDAccountant(value_discretization_interval=discretization)


def _dp_accounting() -> Any:
    try:
        import dp_accounting
    except ImportError:
        raise InputError(f"differential privacy needs dp-accounting: {install_command('privacy')}") from None
    return dp_accounting
