"""Fix how much noise a run's steps have, so that the promise made about its data holds, and charge them to the ledger.

    strict   epsilon given: the smallest noise with which all steps fit into what the ledger has left
             noise_multiplier given: that noise; with epsilon too, only where all steps fit
    paper    DP-LoRA as published (`paper_mode`), its real cost on record and reported

How much is left and what more steps would cost, the ledger knows; nothing of the history is kept here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hecompile.errors import InputError, PrivacyError
from hecompile.runtime.privacy.accountant import Mechanism, calibrate_noise, spent_epsilon
from hecompile.runtime.privacy.clipping import Grid
from hecompile.runtime.privacy.ledger import PrivacyLedger, Subject
from hecompile.runtime.privacy.paper_mode import paper_epsilon, paper_mechanism, paper_noise
from hecompile.runtime.recipes.privacy import PrivacySection

LEDGER_COPY = "privacy_ledger.jsonl"
"""A checkpoint's copy of the ledger."""
MOST_NOISE = 4.0
"""Times the noise that the promise would need by itself. Where earlier releases left so little that it takes more, a run
must ask for the noise by name.

A calibrated run leaves some slack, 0.1 % of a budget or so, and a second one fits into it at 15 times the noise or more,
from which nothing is learned. Four times the noise is to a gradient what a quarter of the batch is. Runs that are meant to
share a budget stay below: where 95 % of epsilon is spent, it is 1.4 to 2.9 times (measured, epsilon 1 to 8)."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrivateRun:
    """Describe the private steps that a run is to take: `steps` Poisson samples, of mean size `batch`, of `examples`.

    checkpoint: where the run goes on from, which has a copy of the ledger; None for a new run.
    whole: the steps of the whole, where `steps` are what is left of it and earlier ones are in the ledger without a
        checkpoint, as in a federation's rounds; by default `steps`.
    """

    train_file: Path
    examples: int
    batch: int
    steps: int
    checkpoint: Path | None = None
    whole: int | None = None

    @property
    def sampling_rate(self) -> float:
        return self.batch / self.examples


@dataclass(frozen=True)
class PrivateSteps:
    """Say how each step of a run is made private, and enter it in the ledger.

    `expected_batch` is the mean size of a Poisson sample; `mechanism` is what a step is charged for; noise and clipping are
    in units of the gradient of the mean over `expected_batch` examples' own means.
    """

    section: PrivacySection
    noise_multiplier: float
    expected_batch: int
    mechanism: Mechanism
    ledger: PrivacyLedger

    @property
    def grid(self) -> Grid:
        """Return the grid that gradients are clipped to and noise is added on. Raises InputError out of range."""
        return Grid.of(self.section.max_grad_norm, self.noise_multiplier)

    def spend(self, step: int) -> None:
        """Enter the release of `step`; it may be made when this returns. Raises as `PrivacyLedger.spend` does."""
        self.ledger.spend(self.mechanism, note=f"step {step}")

    def copy_ledger(self, checkpoint: Path) -> None:
        """Write the ledger's copy into the directory of a checkpoint."""
        self.ledger.copy_to(checkpoint / LEDGER_COPY)

    def describe(self) -> str:
        """Say in one line what was promised and spent, all runs of the ledger together."""
        delta, ledger = self.section.delta, self.ledger
        spent = f"epsilon {ledger.spent():.4g} at delta {delta:g} spent by {ledger.releases} releases ({ledger.path})"
        if self.section.mode == "strict":
            return f"privacy: {spent}; noise multiplier {self.noise_multiplier:.4g}"
        return (
            f"privacy, mode paper (DP-LoRA as published): noise multiplier {self.noise_multiplier:.4g}, for which its "
            f"formula says epsilon {paper_epsilon(self.noise_multiplier, delta):.4g} per iteration; really {spent}, and "
            f"{ledger.spent_without_sampling():.4g} for batches that are not Poisson samples"
        )


@contextmanager
def private_steps(section: PrivacySection, run: PrivateRun) -> Iterator[PrivateSteps]:
    """Open the ledger and fix the noise of the run's steps; the ledger is closed at the end.

    Raises InputError where the budget does not suffice, or only for far more noise than the promise itself needs (see
    MOST_NOISE), or a value is out of range, PrivacyError where the ledger cannot be relied on; nothing was spent then.
    """
    if run.batch > run.examples:
        raise InputError(
            f"a step has {run.batch} examples (per_device_train_batch_size · gradient_accumulation_steps), but there are "
            f"only {run.examples}; lower it"
        )
    strict = section.mode == "strict"
    subject = Subject.of_file(run.train_file, run.examples, section.delta)
    with PrivacyLedger(section.ledger_of(run.train_file), subject, section.epsilon if strict else None) as ledger:
        if run.checkpoint is not None:
            ledger.require(run.checkpoint / LEDGER_COPY)
        noise = _strict_noise(section, run, ledger) if strict else _paper_noise(section)
        mechanism = (Mechanism if strict else paper_mechanism)(noise, run.sampling_rate)
        Grid.of(section.max_grad_norm, noise)  # raises out of range
        private = PrivateSteps(section, noise, run.batch, mechanism, ledger)
        ledger.expect(mechanism, run.steps)
        if not strict:
            _warn_of_paper(private, run.steps)
        yield private


def _strict_noise(section: PrivacySection, run: PrivateRun, ledger: PrivacyLedger) -> float:
    given = section.noise_multiplier
    if given is not None:
        _require_room(given, run, ledger)
        _require_signal(given, run, ledger)
        return given
    noise = _calibrated_noise(run, ledger)
    _require_signal(noise, run, ledger)
    _require_moderate(noise, run, ledger)
    return noise


def _paper_noise(section: PrivacySection) -> float:
    if section.noise_multiplier is not None:
        return section.noise_multiplier
    assert section.epsilon is not None  # a section has one or the other
    return paper_noise(section.epsilon, section.delta)


def _warn_of_paper(private: PrivateSteps, steps: int) -> None:
    delta = private.section.delta
    _LOG.warning(
        "privacy mode 'paper': its formula says epsilon %.4g per iteration; the run's %d steps really spend %.4g",
        paper_epsilon(private.noise_multiplier, delta),
        steps,
        spent_epsilon([(private.mechanism, steps)], delta),
    )


def _calibrated_noise(run: PrivateRun, ledger: PrivacyLedger) -> float:
    before = _own_mechanism(run, ledger)
    # Steps that a crash took back were spent all the same: the old noise may no longer do for those that are left.
    if before is not None and ledger.spent_with(before, run.steps) <= _budget(ledger):
        return before.noise_multiplier
    return ledger.calibrate(run.sampling_rate, run.steps)


def _own_mechanism(run: PrivateRun, ledger: PrivacyLedger) -> Mechanism | None:
    """Return what the run's own steps so far were; None for a new run, or one that now samples at another rate."""
    last = ledger.last
    own = run.checkpoint is not None and last is not None and last.sampling_rate == run.sampling_rate
    return last if own else None


def _require_room(noise: float, run: PrivateRun, ledger: PrivacyLedger) -> None:
    """Raise InputError where the budget, if there is one, does not allow all steps at this noise."""
    allowed = ledger.affordable(Mechanism(noise, run.sampling_rate), run.steps)
    if allowed < run.steps:
        raise InputError(
            f"the privacy budget epsilon {_budget(ledger):g} (delta {ledger.subject.delta:g}), of which "
            f"{ledger.spent():.4g} is spent ({ledger.path}), allows {allowed} of the run's {run.steps} steps at noise "
            f"multiplier {noise:g}; take fewer steps or more noise, or raise privacy.epsilon"
        )


def _require_signal(noise: float, run: PrivateRun, ledger: PrivacyLedger) -> None:
    """Raise InputError for noise of more clipping norms than the batch has examples."""
    if noise <= run.batch:
        return
    excess = f"noise of {noise:.4g} clipping norms on a batch of {run.batch} examples"
    loss = "nothing of their gradient would be left"
    if ledger.epsilon is None:
        raise InputError(f"privacy.noise_multiplier asks for {excess}: {loss}; lower it, or take larger batches")
    raise InputError(
        f"the privacy budget epsilon {ledger.epsilon} (delta {ledger.subject.delta:g}), of which {ledger.spent():.4g} is "
        f"spent ({ledger.path}), asks for {excess}: {loss}; raise epsilon, take larger batches or fewer steps"
    )


def _require_moderate(noise: float, run: PrivateRun, ledger: PrivacyLedger) -> None:
    """Raise InputError where what earlier releases left of epsilon takes far more noise than all of it would for the whole
    run; for a resumed run, than its own steps had so far."""
    epsilon, delta, rate = _budget(ledger), ledger.subject.delta, run.sampling_rate
    moderate, whole = noise / MOST_NOISE, run.whole or run.steps
    if ledger.last is None or spent_epsilon([(Mechanism(moderate, rate), whole)], delta) > epsilon:
        return
    # A crash may have cost steps of the run itself, of which those that are left are the smaller part, and need less noise.
    before = _own_mechanism(run, ledger)
    own = 0.0 if before is None else before.noise_multiplier
    if moderate <= own:
        return
    usual = max(own, calibrate_noise(epsilon, delta, rate, whole))
    usually = Mechanism(usual, rate)
    fit = ledger.affordable(usually, run.steps)
    whose = "of the steps before" if usual == own else "that all of it would need"
    raise InputError(
        f"of the privacy budget epsilon {epsilon:g} (delta {delta:g}) only {epsilon - ledger.spent():.2g} is left "
        f"({ledger.path}): {run.steps} steps need noise multiplier {noise:.4g} to stay within, "
        f"{noise / usual:.2g} times the {usual:.3g} {whose}, and would learn next to nothing. Raise privacy.epsilon "
        f"(to {_rounded_up(ledger.spent_with(usually, run.steps)):g} for noise multiplier {usual:.3g}), "
        f"{f'take at most {fit} of them, ' if fit else ''}or, if so much noise is what you want, set "
        f"privacy.noise_multiplier={_rounded_up(noise):g}"
    )


def _budget(ledger: PrivacyLedger) -> float:
    assert ledger.epsilon is not None  # noise is calibrated, and steps are refused, for a budget only
    return ledger.epsilon


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
