"""Resume with more steps than the run was meant to have: the learning rates left are those of a run of that length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hecompile.runtime.training.metrics import read_metrics
from hecompile.runtime.training.train import run_training
from tests.support.training import make_model, make_recipe, make_tokenizer

TOKENIZER = make_tokenizer()
FOUR = {"max_steps": 4}
TWELVE = {"max_steps": 12}
EPOCHS = ({"num_train_epochs": 1, "max_steps": -1}, {"num_train_epochs": 2.5, "max_steps": -1})  # 5 and 13 steps


def rates(directory: Path, resume: bool = False, **training: Any) -> dict[int, float]:
    directory.mkdir(exist_ok=True)
    settings = {"save_steps": 4, "warmup_steps": 0} | training
    run_training(make_model(), TOKENIZER, make_recipe(directory, **settings), resume=resume)
    records = [record for record in read_metrics(directory / "run/metrics.jsonl") if "loss" in record]
    return {record["step"]: record["learning_rate"] for record in records}


def longer(directory: Path, short: dict[str, Any], long: dict[str, Any], **schedule: Any) -> None:
    """Compare a run of `short` that goes on to `long` with one that was meant to be `long`."""
    before = rates(directory / "a", **short, **schedule)
    after = rates(directory / "a", resume=True, **long, **schedule)
    whole = rates(directory / "b", **long, **schedule)
    taken = len(before)
    assert 4 <= taken < len(whole) == len(after)
    assert {step: after[step] for step in before} == before
    assert {step: rate for step, rate in after.items() if step > taken} == {
        step: rate for step, rate in whole.items() if step > taken
    }


@pytest.mark.parametrize("warmup", [{"warmup_ratio": 0.5}, {"warmup_steps": 2}], ids=["fraction", "steps"])
@pytest.mark.parametrize(
    "kind",
    ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"],
)
def test_the_steps_left_have_the_rates_of_the_longer_run(tmp_path: Path, kind: str, warmup: dict[str, Any]) -> None:
    longer(tmp_path, FOUR, TWELVE, lr_scheduler_type=kind, **warmup)


def test_also_where_epochs_count_the_steps(tmp_path: Path) -> None:
    longer(tmp_path, *EPOCHS, lr_scheduler_type="linear", warmup_ratio=0.5)


def test_saving_and_evaluating_go_by_the_settings_of_now(tmp_path: Path) -> None:
    rates(tmp_path, max_steps=4, save_strategy="steps", save_steps=4, eval_steps=4)
    rates(tmp_path, resume=True, max_steps=8, save_strategy="steps", save_steps=3, eval_steps=2)
    run = tmp_path / "run"
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6", "checkpoint-8"]
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl") if "eval_loss" in record] == [4, 6, 8]
