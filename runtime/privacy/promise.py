"""One run's share in a promise: how much noise a step has, what it costs, and the ledger it is charged to."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hecompile.errors import InputError, PrivacyError
from hecompile.runtime.privacy.accountant import Mechanism, affordable, calibrate_noise, spent_epsilon
from hecompile.runtime.privacy.clipping import Grid
from hecompile.runtime.privacy.ledger import PrivacyLedger, Subject
from hecompile.runtime.recipes.privacy import PrivacySection

LEDGER_COPY = "privacy_ledger.jsonl"
"""A checkpoint's copy of the ledger."""
MOST_NOISE = 4.0
"""Times what the promise would need by itself: more noise than that, as earlier releases left so little, must be asked for.

A calibrated run leaves some slack, 0.1 % of a budget or so, and a second one fits into it at 15 times the noise or more,
from which nothing is learned. Four times the noise is to a gradient what a quarter of the batch is. Runs that are meant to
share a budget stay below: where 95 % of epsilon is spent, it is 1.4 to 2.9 times (measured, epsilon 1 to 8)."""
_PAPER_SENSITIVITY = 2 * math.sqrt(2)
_LOG = logging.getLogger(__name__)


def paper_noise(epsilon: float, delta: float) -> float:
    """σ = √(2 ln(1.25/δ)) / ε, DP-LoRA's condition per iteration (arXiv 2312.17493, from Dwork & Roth, theorem A.1, which
    holds for ε < 1 and a sensitivity of one clipping norm)."""
    return math.sqrt(2 * math.log(1.25 / delta)) / epsilon


def paper_epsilon(noise_multiplier: float, delta: float) -> float:
    """The ε per iteration that the same formula gives to a noise multiplier; infinity for none."""
    return math.sqrt(2 * math.log(1.25 / delta)) / noise_multiplier if noise_multiplier else math.inf


def paper_mechanism(noise_multiplier: float, sampling_rate: float) -> Mechanism:
    """What a step of DP-LoRA as published really is. An example more or less turns the batch's clipped gradient from any
    vector of norm at most C into any other: 2C for A and 2C for B, together 2√2·C, against noise of σC."""
    return Mechanism(noise_multiplier / _PAPER_SENSITIVITY, sampling_rate)


@dataclass(frozen=True)
class PrivateSteps:
    """How a run's steps are made private. `expected_batch` is the mean size of a Poisson sample; `mechanism` is what each
    step is charged for; noise and clipping are in units of the gradient of the mean over `expected_batch` examples' own
    means."""

    section: PrivacySection
    noise_multiplier: float
    expected_batch: int
    mechanism: Mechanism
    ledger: PrivacyLedger

    @property
    def grid(self) -> Grid:
        """Where gradients are clipped to and noise is added."""
        return Grid.of(self.section.max_grad_norm, self.noise_multiplier)

    def describe(self) -> str:
        """One line for people: what was promised and spent, all runs of the ledger together."""
        delta, ledger = self.section.delta, self.ledger
        spent = f"epsilon {ledger.spent():.4g} at delta {delta:g} spent by {ledger.releases} releases ({ledger.path})"
        if self.section.mode == "strict":
            return f"privacy: {spent}; noise multiplier {self.noise_multiplier:.4g}"
        unsampled = [(Mechanism(mechanism.noise_multiplier, 1.0), count) for mechanism, count in ledger.history]
        return (
            f"privacy, mode paper (DP-LoRA as published): noise multiplier {self.noise_multiplier:.4g}, for which its "
            f"formula says epsilon {paper_epsilon(self.noise_multiplier, delta):.4g} per iteration; really {spent}, and "
            f"{spent_epsilon(unsampled, delta):.4g} for batches that are not Poisson samples"
        )


@contextmanager
def private_steps(
    section: PrivacySection,
    train_file: Path,
    examples: int,
    batch: int,
    steps: int,
    checkpoint: Path | None,
    planned: int | None = None,
) -> Iterator[PrivateSteps]:
    """Open the ledger and fix the noise of the run's remaining `steps` of `batch` examples each; the ledger is closed at
    the end.

    planned: the steps of the whole, where `steps` are what is left of it and earlier ones are in the ledger without a
        checkpoint, as in a federation's rounds.

    Raises InputError where the budget does not suffice, or only for far more noise than the promise itself needs (see
    MOST_NOISE), or a value is out of range, PrivacyError where the ledger cannot be relied on; nothing was spent then.
    """
    if batch > examples:
        raise InputError(
            f"a step has {batch} examples (per_device_train_batch_size · gradient_accumulation_steps), but there are only "
            f"{examples}; lower it"
        )
    rate = batch / examples
    subject = Subject.of_file(train_file, examples, section.delta)
    budget = section.epsilon if section.mode == "strict" else None
    with PrivacyLedger(section.ledger_of(train_file), subject, budget) as ledger:
        if checkpoint is not None:
            ledger.require(checkpoint / LEDGER_COPY)
        noise = _noise(section, ledger, rate, steps, resumed=checkpoint is not None)
        if section.mode == "strict" and noise > batch:
            raise InputError(
                f"the privacy budget epsilon {section.epsilon} (delta {section.delta:g}), of which {ledger.spent():.4g} is "
                f"spent ({ledger.path}), asks for noise of {noise:.4g} clipping norms on a batch of {batch} examples: "
                f"nothing of their gradient would be left; raise epsilon, take larger batches or fewer steps"
            )
        if section.mode == "strict" and section.noise_multiplier is None:
            _require_moderate(section, ledger, Mechanism(noise, rate), steps, planned or steps, checkpoint is not None)
        mechanism = (Mechanism if section.mode == "strict" else paper_mechanism)(noise, rate)
        Grid.of(section.max_grad_norm, noise)  # raises out of range
        ledger.expect(mechanism, steps)
        if section.mode == "paper":
            _LOG.warning(
                "privacy mode 'paper': its formula says epsilon %.4g per iteration; the run's %d steps really spend %.4g",
                paper_epsilon(noise, section.delta),
                steps,
                spent_epsilon([(mechanism, steps)], section.delta),
            )
        yield PrivateSteps(section, noise, batch, mechanism, ledger)


def _noise(section: PrivacySection, ledger: PrivacyLedger, rate: float, steps: int, resumed: bool) -> float:
    epsilon, delta = section.epsilon, section.delta
    if section.noise_multiplier is not None:
        if epsilon is not None:
            mechanism = Mechanism(section.noise_multiplier, rate)
            most = affordable(epsilon, delta, mechanism, ledger.history, steps)
            if most < steps:
                raise InputError(
                    f"the privacy budget epsilon {epsilon:g} (delta {delta:g}), of which {ledger.spent():.4g} is spent "
                    f"({ledger.path}), allows {most} of the run's {steps} steps at noise multiplier "
                    f"{section.noise_multiplier:g}; take fewer steps or more noise, or raise privacy.epsilon"
                )
        return section.noise_multiplier
    assert epsilon is not None
    if section.mode == "paper":
        return paper_noise(epsilon, delta)
    last = ledger.last
    if resumed and last is not None and last.sampling_rate == rate:
        # Steps that a crash took back were spent all the same: the old noise may no longer do for those that are left.
        enough = spent_epsilon([*ledger.history, (last, steps)], delta) <= epsilon
        if enough:
            return last.noise_multiplier
    try:
        return calibrate_noise(epsilon, delta, rate, steps, ledger.history)
    except InputError as error:
        raise InputError(f"{error} ({ledger.path})") from None


def _require_moderate(
    section: PrivacySection, ledger: PrivacyLedger, found: Mechanism, steps: int, planned: int, resumed: bool
) -> None:
    """Raise InputError where what earlier releases left of epsilon takes far more noise than all of it would for `planned`
    steps; for a resumed run, than its own steps had so far."""
    epsilon, delta, rate = section.epsilon, section.delta, found.sampling_rate
    assert epsilon is not None
    moderate, last = found.noise_multiplier / MOST_NOISE, ledger.last
    if last is None or spent_epsilon([(Mechanism(moderate, rate), planned)], delta) > epsilon:
        return
    # A crash may have cost steps of the run itself, of which those that are left are the smaller part, and need less noise.
    own = last.noise_multiplier if resumed and last.sampling_rate == rate else 0.0
    if moderate <= own:
        return
    usual = max(own, calibrate_noise(epsilon, delta, rate, planned))
    enough = spent_epsilon([*ledger.history, (Mechanism(usual, rate), steps)], delta)
    fit = affordable(epsilon, delta, Mechanism(usual, rate), ledger.history, steps)
    raise InputError(
        f"of the privacy budget epsilon {epsilon:g} (delta {delta:g}) only {epsilon - ledger.spent():.2g} is left "
        f"({ledger.path}): {steps} steps need noise multiplier {found.noise_multiplier:.4g} to stay within, "
        f"{found.noise_multiplier / usual:.2g} times the {usual:.3g} {_whose(own, usual)}, and would learn next to "
        f"nothing. Raise privacy.epsilon (to {_rounded_up(enough):g} for noise multiplier {usual:.3g}), "
        f"{f'take at most {fit} of them, ' if fit else ''}or, if so much noise is what you want, set "
        f"privacy.noise_multiplier={_rounded_up(found.noise_multiplier):g}"
    )


def _whose(own: float, usual: float) -> str:
    return "of the steps before" if usual == own else "that all of it would need"


def _rounded_up(value: float) -> float:
    return math.ceil(value * 100) / 100


def check_same_promise(checkpoint: Path, section: PrivacySection | None) -> None:
    """Raise PrivacyError where a run with a promise is to go on without one, or the other way round: the adapter of the
    whole run would then keep none."""
    private = (checkpoint / LEDGER_COPY).is_file()
    if private and section is None:
        raise PrivacyError(
            f"{checkpoint} was trained with differential privacy; steps without it would void what was promised. Keep the "
            f"privacy section, or start a new run"
        )
    if section is not None and not private:
        raise PrivacyError(
            f"{checkpoint} was trained without differential privacy; private steps after it promise nothing. Start a new run"
        )
