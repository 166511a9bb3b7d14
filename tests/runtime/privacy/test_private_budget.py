"""Charge private runs for what they release: crashes, resumed runs, one budget for all runs on a dataset."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hecompile.errors import HecompileError, InputError, PrivacyError
from hecompile.runtime.privacy.promise import PrivateSteps
from hecompile.runtime.recipes.privacy import PrivacySection
from hecompile.runtime.training import private_trainer as private_trainer
from hecompile.runtime.training.metrics import read_metrics
from hecompile.runtime.training.train import run_training
from tests.runtime.privacy.support import DELTA, TOKENIZER, everyone, ledger_of, private_recipe
from tests.support.training import SECRET, make_model, make_recipe


def test_a_release_is_entered_before_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    recipe = private_recipe(tmp_path, {"noise_multiplier": 1.0})
    monkeypatch.setattr(private_trainer, "add_noise", crash)
    model = make_model()
    with pytest.raises(KeyboardInterrupt):
        run_training(model, TOKENIZER, recipe)
    with ledger_of(recipe) as ledger:
        assert ledger.releases == 1
    # What fails before anything could be released costs nothing.
    monkeypatch.setattr(private_trainer, "clipped_sum", crash)
    with pytest.raises(KeyboardInterrupt):
        run_training(model, TOKENIZER, private_recipe(tmp_path, {"noise_multiplier": 1.0}, **everyone()))
    with ledger_of(recipe) as ledger:
        assert ledger.releases == 1
    assert all(torch.equal(value, make_model().adapter_state()[name]) for name, value in model.adapter_state().items())


def test_a_resumed_run_pays_for_the_steps_that_the_crash_took_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = private_recipe(tmp_path, {"epsilon": 3.0}, max_steps=6, save_strategy="steps", save_steps=3)
    real = PrivateSteps.spend

    def killed(self: PrivateSteps, step: int) -> None:
        real(self, step)
        if step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(PrivateSteps, "spend", killed)
    with pytest.raises(KeyboardInterrupt):
        run_training(make_model(), TOKENIZER, recipe)
    monkeypatch.undo()
    with ledger_of(recipe) as ledger:
        assert ledger.releases == 5
        first = ledger.last
    result = run_training(make_model(), TOKENIZER, recipe, resume=True)
    assert result.steps == 6
    with ledger_of(recipe) as ledger:
        assert ledger.releases == 8  # 5, and steps 4 to 6
        assert first is not None and ledger.last is not None
        assert ledger.last.noise_multiplier > first.noise_multiplier
        assert 2.97 < ledger.spent() <= 3.0
    records = [record["step"] for record in read_metrics(tmp_path / "run/metrics.jsonl")]
    assert records == [1, 2, 3, 4, 5, 6]


def test_a_run_resumed_without_loss_keeps_its_noise(tmp_path: Path) -> None:
    recipe = private_recipe(tmp_path, {"epsilon": 3.0}, max_steps=4, save_strategy="steps", save_steps=2)
    run_training(make_model(), TOKENIZER, recipe)
    path = tmp_path / "train.jsonl.ledger"
    path.write_bytes((tmp_path / "run/checkpoint-2/privacy_ledger.jsonl").read_bytes())  # as if step 3 had not begun
    shutil.rmtree(tmp_path / "run/checkpoint-4")
    run_training(make_model(), TOKENIZER, recipe, resume=True)
    with ledger_of(recipe) as ledger:
        assert [count for _, count in ledger.history] == [4]


def test_a_promise_cannot_be_dropped_taken_up_or_forgotten_halfway(tmp_path: Path) -> None:
    private = private_recipe(tmp_path, {"noise_multiplier": 1.0}, max_steps=2, save_strategy="steps", save_steps=2)
    run_training(make_model(), TOKENIZER, private)
    longer = private.model_copy(update={"training": private.training.model_copy(update={"max_steps": 4})})
    with pytest.raises(PrivacyError, match="was trained with differential privacy; steps without it would void"):
        run_training(make_model(), TOKENIZER, longer.model_copy(update={"privacy": None}), resume=True)
    (tmp_path / "train.jsonl.ledger").unlink()
    with pytest.raises(PrivacyError, match=r"does not hold all that .*checkpoint-2/privacy_ledger"):
        run_training(make_model(), TOKENIZER, longer, resume=True)
    plain = make_recipe(tmp_path, max_steps=2, save_steps=2, overwrite_output_dir=True)
    run_training(make_model(), TOKENIZER, plain)
    with pytest.raises(PrivacyError, match="was trained without differential privacy"):
        run_training(make_model(), TOKENIZER, longer, resume=True)


def test_every_run_on_a_dataset_spends_from_one_budget(tmp_path: Path) -> None:
    recipe = private_recipe(tmp_path, {"epsilon": 1.0}, max_steps=3)
    run_training(make_model(), TOKENIZER, recipe)
    again = recipe.model_copy(update={"training": recipe.training.model_copy(update={"output_dir": tmp_path / "b"})})
    with pytest.raises(
        InputError, match=r"epsilon 1\.0 \(delta 0\.001\), of which .* is spent .*nothing of their gradient"
    ):
        run_training(make_model(), TOKENIZER, again)
    fixed = again.model_copy(update={"privacy": PrivacySection(epsilon=1.3, noise_multiplier=3.0, delta=DELTA)})
    long = fixed.training.model_copy(update={"max_steps": 60})
    with pytest.raises(InputError, match=r"allows \d+ of the run's 60 steps at noise multiplier 3; take fewer"):
        run_training(make_model(), TOKENIZER, fixed.model_copy(update={"training": long}))
    assert not (tmp_path / "b").exists()
    with ledger_of(recipe) as ledger:
        assert ledger.releases == 3


def test_nothing_of_the_data_is_in_the_ledger(tmp_path: Path) -> None:
    recipe = private_recipe(tmp_path, {"noise_multiplier": 1.0}, max_steps=1)
    run_training(make_model(), TOKENIZER, recipe)
    text = (tmp_path / "train.jsonl.ledger").read_text()
    assert SECRET not in text
    assert json.loads(text.splitlines()[1])["note"] == "step 1"


def test_a_gradient_that_is_not_finite_is_neither_released_nor_paid_for(tmp_path: Path) -> None:
    model = make_model()
    real = model.per_example_gradients

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        next(iter(found.gradients.values()))[0, 0, 0] = float("inf")
        return found

    model.per_example_gradients = poisoned  # type: ignore[method-assign]
    recipe = private_recipe(tmp_path, {"noise_multiplier": 1.0}, **everyone(max_steps=1))
    with pytest.raises(HecompileError, match="is not finite for an example; the step was not taken"):
        run_training(model, TOKENIZER, recipe)
    with ledger_of(recipe) as ledger:
        assert ledger.releases == 0
