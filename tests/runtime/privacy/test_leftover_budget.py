"""Spend what earlier runs left of a budget, and refuse runs that would learn nothing with it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hecompile.errors import InputError
from hecompile.runtime.privacy.accountant import Mechanism, calibrate_noise
from hecompile.runtime.privacy.ledger import PrivacyLedger, Subject
from hecompile.runtime.privacy.promise import LEDGER_COPY, MOST_NOISE, PrivateRun, private_steps
from hecompile.runtime.recipes.privacy import PrivacySection
from hecompile.runtime.training.train import run_training
from tests.runtime.privacy.support import DELTA, TOKENIZER, everyone, ledger_of, private_recipe
from tests.support.training import make_model

EXAMPLES, BATCH, STEPS, EPSILON = 2048, 256, 4, 8.0


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text("any text\n")
    return path


def ledger(data: Path) -> PrivacyLedger:
    return PrivacyLedger(data.with_name("train.jsonl.ledger"), Subject.of_file(data, EXAMPLES, 1e-4))


def run(
    data: Path, epsilon: float | None, steps: int = STEPS, checkpoint: Path | None = None, batch: int = BATCH, **more: float
) -> float:
    """Take all steps of a run, as far as the ledger can tell; its noise multiplier."""
    section = PrivacySection(epsilon=epsilon, delta=1e-4, **more)
    with private_steps(section, PrivateRun(data, EXAMPLES, batch, steps, checkpoint)) as private:
        private.ledger.spend(private.mechanism, steps)
        return private.noise_multiplier


def test_a_second_run_on_a_spent_budget_is_refused_with_what_would_do(data: Path) -> None:
    first = run(data, EPSILON)
    with pytest.raises(InputError) as caught:
        run(data, EPSILON)
    said = re.search(
        r"of the privacy budget epsilon 8 \(delta 0\.0001\) only 0\.0\d+ is left \(.*train\.jsonl\.ledger\): 4 steps need "
        r"noise multiplier ([\d.]+) to stay within, \d\d times the ([\d.]+) that all of it would need, and would learn next "
        r"to nothing\. Raise privacy\.epsilon \(to ([\d.]+) for noise multiplier [\d.]+\), or, if so much noise is what you "
        r"want, set privacy\.noise_multiplier=([\d.]+)$",
        str(caught.value),
    )
    assert said is not None, caught.value
    needed, usual, epsilon, advised = map(float, said.groups())
    assert needed > 10 and usual == pytest.approx(first, rel=1e-2)
    with ledger(data) as record:
        assert record.releases == STEPS  # nothing was spent
    # Each advice, as it is given, is one that works.
    assert run(data, EPSILON, noise_multiplier=advised) == advised
    assert run(data, epsilon) == pytest.approx(first, rel=2e-2)


def test_a_budget_may_be_used_in_parts(data: Path) -> None:
    noises = [run(data, EPSILON * part) for part in (0.5, 0.9, 1.0)]
    alone = calibrate_noise(EPSILON, 1e-4, BATCH / EXAMPLES, STEPS)
    assert all(noise < MOST_NOISE * alone for noise in noises[1:])


def test_the_last_of_many_rounds_is_measured_by_all_of_them(data: Path) -> None:
    """A federation over Flower calibrates in every round: one round by itself would need little noise."""
    rounds, steps = 60, 2
    noise = calibrate_noise(1.0, 1e-4, 0.5, rounds * steps)
    with ledger(data) as record:
        record.spend(Mechanism(noise, 0.5), (rounds - 1) * steps)
    section = PrivacySection(epsilon=1.0, delta=1e-4)
    with private_steps(section, PrivateRun(data, EXAMPLES, EXAMPLES // 2, steps, whole=rounds * steps)) as private:
        assert private.noise_multiplier == pytest.approx(noise, rel=0.1)
    with (
        pytest.raises(InputError, match="learn next to nothing"),
        private_steps(section, PrivateRun(data, EXAMPLES, EXAMPLES // 2, steps)),
    ):
        pass


def test_a_crash_close_to_the_end_can_be_resumed(data: Path, tmp_path: Path) -> None:
    noise = calibrate_noise(1.0, 1e-4, 0.5, 100)
    with ledger(data) as record:
        record.spend(Mechanism(noise, 0.5), 98)
        record.copy_to(tmp_path / LEDGER_COPY)
        record.spend(Mechanism(noise, 0.5))  # and then the power went
    resumed = run(data, 1.0, 2, tmp_path, EXAMPLES // 2)
    assert noise < resumed < 2 * noise
    assert resumed > MOST_NOISE * calibrate_noise(1.0, 1e-4, 0.5, 2)  # two steps by themselves need little


def test_a_finished_run_is_not_made_longer_for_nothing(data: Path, tmp_path: Path) -> None:
    run(data, EPSILON)
    with ledger(data) as record:
        record.copy_to(tmp_path / LEDGER_COPY)
    with pytest.raises(InputError, match=r"4 steps need .* times the [\d.]+ of the steps before, .* learn next to nothing"):
        run(data, EPSILON, checkpoint=tmp_path)


def test_an_overspent_budget_says_whose_ledger_it_was_and_what_to_do(data: Path) -> None:
    run(data, EPSILON)
    path = r"\(.*train\.jsonl\.ledger\)"
    with pytest.raises(InputError, match=rf"is spent: releases so far cost 8; raise epsilon above that, .* {path}$"):
        run(data, 0.5)
    with pytest.raises(InputError, match=rf"is spent {path}, allows 0 of the run's 4 steps .*, or raise privacy\.epsilon$"):
        run(data, 0.5, noise_multiplier=3.0)


def test_a_refused_run_leaves_the_adapter_that_it_would_have_replaced(tmp_path: Path) -> None:
    recipe = private_recipe(tmp_path, {"epsilon": 40.0}, **everyone(max_steps=1, overwrite_output_dir=True))
    adapter = run_training(make_model(), TOKENIZER, recipe).adapter_dir / "adapter_model.safetensors"
    before = adapter.read_bytes()
    with pytest.raises(InputError, match="learn next to nothing") as caught:
        run_training(make_model(), TOKENIZER, recipe)
    assert adapter.read_bytes() == before
    advised = float(str(caught.value).rpartition("=")[2])
    wanted = private_recipe(
        tmp_path, {"epsilon": 40.0, "noise_multiplier": advised}, **everyone(max_steps=1, overwrite_output_dir=True)
    )
    run_training(make_model(), TOKENIZER, wanted)
    assert adapter.read_bytes() != before
    with ledger_of(recipe) as record:
        assert record.releases == 2 and record.subject.delta == DELTA


def test_noise_beyond_the_batch_says_what_asked_for_it(data: Path) -> None:
    with pytest.raises(InputError, match=r"privacy\.noise_multiplier asks for noise of 300 .* 256 examples: .*; lower it"):
        run(data, None, noise_multiplier=300.0)
    with pytest.raises(InputError, match=r"budget epsilon 8\.0 .* asks for noise of 300 .*; raise epsilon, take larger"):
        run(data, EPSILON, noise_multiplier=300.0)
