"""Compare the accountant with the Gaussian's closed form, with Opacus, and with itself: what calibrated noise spends."""

from __future__ import annotations

import math
import warnings

import pytest
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy.optimize import brentq
from scipy.stats import norm

from hecompile.errors import InputError
from hecompile.runtime.privacy.accountant import Mechanism, affordable, calibrate_noise, check_delta, spent_epsilon


def gaussian_epsilon(noise: float, releases: int, delta: float) -> float:
    """Return the ε of Gaussian releases without sampling, in closed form (Balle & Wang, arXiv 1805.06530, theorem 8).

    Releases compose to one of noise / √releases.
    """
    mu = math.sqrt(releases) / noise

    def gap(epsilon: float) -> float:
        return norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu) - delta

    return float(brentq(gap, 0, 200))


@pytest.mark.parametrize(("noise", "releases", "delta"), [(2.0, 50, 1e-5), (1.0, 1, 1e-6), (5.0, 300, 1e-4)])
def test_without_sampling_it_is_the_closed_form(noise: float, releases: int, delta: float) -> None:
    exact = gaussian_epsilon(noise, releases, delta)
    spent = spent_epsilon([(Mechanism(noise, 1.0), releases)], delta)
    assert exact <= spent <= exact * (1 + 1e-4)
    # Releases in two lots cost what they cost in one.
    assert spent_epsilon([(Mechanism(noise, 1.0), 1), (Mechanism(noise, 1.0), releases - 1)], delta) == pytest.approx(
        spent
    )


@pytest.mark.parametrize(("noise", "rate", "releases", "delta"), [(1.1, 0.25, 36, 1e-4), (0.9, 0.02, 1000, 1e-5)])
def test_agrees_with_opacus(noise: float, rate: float, releases: int, delta: float) -> None:
    """Its PRV accountant (numerical, as ours) within its stated errors, its RDP accountant (an upper bound) from below."""
    ours = spent_epsilon([(Mechanism(noise, rate), releases)], delta)
    prv, rdp = PRVAccountant(), RDPAccountant()
    prv.history = rdp.history = [(noise, rate, releases)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert prv.get_epsilon(delta, eps_error=0.01, delta_error=delta / 1000) == pytest.approx(ours, abs=0.02)
        assert ours < rdp.get_epsilon(delta) < 1.25 * ours


@pytest.mark.parametrize(("epsilon", "delta", "rate", "releases"), [(1.0, 1e-4, 0.25, 20), (2.0, 1e-5, 0.3, 30)])
def test_calibrated_noise_spends_the_budget_and_no_more(
    epsilon: float, delta: float, rate: float, releases: int
) -> None:
    noise = calibrate_noise(epsilon, delta, rate, releases)
    assert 0.99 * epsilon < spent_epsilon([(Mechanism(noise, rate), releases)], delta) <= epsilon
    assert spent_epsilon([(Mechanism(noise - 2e-3, rate), releases)], delta) > epsilon
    # What is spent already makes for more noise, and the whole still keeps to the budget.
    history = [(Mechanism(noise, rate), releases // 2)]
    later = calibrate_noise(epsilon, delta, rate, releases, history)
    assert later > noise
    assert 0.99 * epsilon < spent_epsilon([*history, (Mechanism(later, rate), releases)], delta) <= epsilon


def test_affordable_is_the_most_that_fits() -> None:
    mechanism, history = Mechanism(6.0, 0.3), [(Mechanism(8.0, 0.5), 3)]
    most = affordable(1.0, 1e-5, mechanism, history)
    assert most > 5
    assert spent_epsilon([*history, (mechanism, most)], 1e-5) <= 1.0
    assert spent_epsilon([*history, (mechanism, most + 1)], 1e-5) > 1.0
    assert affordable(1.0, 1e-5, mechanism, history, most=5) == 5
    assert affordable(0.5, 1e-5, mechanism, [(Mechanism(0.5, 0.5), 3)]) == 0


def test_nothing_costs_nothing_and_no_noise_costs_everything() -> None:
    assert spent_epsilon([], 1e-5) == spent_epsilon([(Mechanism(0.0, 0.5), 0)], 1e-5) == 0.0
    assert spent_epsilon([(Mechanism(3.0, 0.5), 4), (Mechanism(0.0, 0.5), 1)], 1e-5) == math.inf


def test_sampling_makes_it_cheaper_and_more_releases_dearer() -> None:
    def cost(rate: float, releases: int) -> float:
        return spent_epsilon([(Mechanism(1.5, rate), releases)], 1e-5)

    assert cost(0.1, 10) < cost(0.2, 10) < cost(1.0, 10)
    assert cost(0.1, 10) < cost(0.1, 20)


def test_a_delta_that_promises_nothing_is_refused_with_one_that_does() -> None:
    check_delta(1e-4, 1000)
    with pytest.raises(InputError, match=r"with 1000 examples it must be below 1/1000 = 0\.001.*try 0\.0001"):
        check_delta(1e-3, 1000)
    for delta in (0.0, 1.0, -1e-5):
        with pytest.raises(InputError, match="between 0 and 1"):
            check_delta(delta)


@pytest.mark.parametrize(
    ("noise", "rate", "message"),
    [(1.0, 0.0, "sampling rate is 0"), (1.0, 1.1, "sampling rate is 1.1"), (-1.0, 0.5, "noise multiplier is -1"),
     (math.nan, 0.5, "noise multiplier is nan"), (math.inf, 0.5, "noise multiplier is inf")],
)  # fmt: skip
def test_a_mechanism_out_of_range_is_refused(noise: float, rate: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Mechanism(noise, rate)


def test_budgets_that_cannot_be_kept_are_refused_with_the_numbers() -> None:
    spent = [(Mechanism(1.0, 1.0), 10)]
    with pytest.raises(InputError, match=r"epsilon 2 \(delta 1e-05\) is spent: releases so far cost 17.*; raise epsilon"):
        calibrate_noise(2.0, 1e-5, 0.1, 10, spent)
    for epsilon in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InputError, match="a finite one above 0"):
            calibrate_noise(epsilon, 1e-5, 0.1, 10)
