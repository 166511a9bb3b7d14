"""Train on files that differ in one line: with the noised gradients held fixed, what a run hands out must not differ."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hecompile.errors import PrivacyError
from hecompile.runtime.privacy.accountant import Mechanism
from hecompile.runtime.privacy.ledger import PrivacyLedger, Subject
from hecompile.runtime.training.metrics import read_metrics
from hecompile.runtime.training.train import run_training
from tests.runtime.privacy.support import TOKENIZER, N, everyone, private_recipe
from tests.support.training import RECORDS, make_model, write_jsonl

LONGER = [{"prompt": "ask 3:", "completion": " another, longer"}]
REPLACED = [*RECORDS[:3], *LONGER, *RECORDS[4:]]
SETTINGS: dict[str, Any] = {
    "save_strategy": "steps", "save_steps": 1, "max_steps": 3, "eval_steps": 1, "overwrite_output_dir": True,
    "gradient_accumulation_steps": 2, "micro_batches_in_flight": 2,
}  # fmt: skip


@pytest.fixture
def same_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold the noised gradients fixed: step after step the same numbers, whatever the sums were."""
    drawn = [0]

    def fixed(sums: Mapping[str, Tensor], *_: Any) -> dict[str, Tensor]:
        drawn[0] += 1
        generator = torch.Generator().manual_seed(drawn[0] % 3)
        return {name: torch.randint(-99, 99, value.shape, generator=generator) for name, value in sums.items()}

    monkeypatch.setattr("hecompile.runtime.training.private_trainer.add_noise", fixed)


def handed_out(directory: Path, records: list[Any], privacy: dict[str, Any], **training: Any) -> dict[str, bytes]:
    """Train on `records` with a fresh ledger; return what is in the output directory, but for the evaluations."""
    recipe = private_recipe(directory, {"noise_multiplier": 1.0} | privacy, **SETTINGS | training)
    write_jsonl(recipe.data.train_file, records)
    (directory / "train.jsonl.ledger").unlink(missing_ok=True)
    result = run_training(make_model(dropout=0.2), TOKENIZER, recipe)
    assert result.metrics.keys() == {"eval_loss", "eval_exact_match"}
    run = directory / "run"
    files = {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    assert {"adapter/adapter_model.safetensors", "checkpoint-3/rng_state.pth", "metrics.jsonl"} < files.keys()
    files.pop("evaluations.jsonl")
    return files


@pytest.mark.parametrize("mode", ["strict", "paper"])
def test_files_are_the_same_for_a_neighbour(tmp_path: Path, same_releases: None, mode: str) -> None:
    files = [handed_out(tmp_path, records, {"mode": mode}, **everyone()) for records in (RECORDS, REPLACED)]
    assert files[0] == files[1]


def test_how_many_lines_a_sample_has_is_in_no_file(
    tmp_path: Path, same_releases: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = []
    for sample in ([0, 1], [], list(range(N))):
        monkeypatch.setattr("hecompile.runtime.privacy.sampling.poisson_sample", lambda *_, own=sample: own)
        files.append(handed_out(tmp_path, RECORDS, {}))
    assert files[0] == files[1] == files[2]


def test_a_line_more_shows_in_the_number_of_lines_alone(tmp_path: Path, same_releases: None) -> None:
    """The number counts as known (docs/privacy.md), and with it what follows from it."""
    fewer = handed_out(tmp_path, RECORDS[:-1], {}, gradient_accumulation_steps=4)
    all_of_them = handed_out(tmp_path, RECORDS, {}, gradient_accumulation_steps=4)
    derived = {"train_examples", "examples", "sampling_rate", "chain", "epoch"}
    for name, content in all_of_them.items():
        if fewer[name] != content:
            assert name.endswith((".json", ".jsonl")), name
            assert _without(content, derived) == _without(fewer[name], derived), name


def _without(content: bytes, names: set[str]) -> Any:
    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: strip(part) for name, part in value.items() if name not in names}
        return [strip(part) for part in value] if isinstance(value, list) else value

    text = content.decode()
    try:
        return strip(json.loads(text))
    except ValueError:
        return [strip(json.loads(line)) for line in text.splitlines()]


def test_a_private_run_writes_no_loss_and_no_time(tmp_path: Path) -> None:
    recipe = private_recipe(tmp_path, {"noise_multiplier": 1.0}, **SETTINGS)
    result = run_training(make_model(), TOKENIZER, recipe)
    run = tmp_path / "run"
    for record in read_metrics(run / "metrics.jsonl"):
        assert record.keys() == {"step", "epoch", "learning_rate", "grad_norm"}
    state = json.loads((run / "checkpoint-3/trainer_state.json").read_text())
    assert state["total_flos"] == 0 and state["best_metric"] is None
    for record in state["log_history"]:
        assert record.keys() <= {"step", "epoch", "learning_rate", "grad_norm"}
    first, *evaluations = read_metrics(run / "evaluations.jsonl")
    assert "does not cover this file" in first["notice"]
    assert [record["step"] for record in evaluations] == [1, 2, 3]
    assert evaluations[-1]["eval_loss"] == result.metrics["eval_loss"]


def test_what_an_earlier_version_wrote_is_not_carried_on(tmp_path: Path) -> None:
    run_training(make_model(), TOKENIZER, private_recipe(tmp_path, {"noise_multiplier": 1.0}, **SETTINGS))
    run = tmp_path / "run"
    path = run / "checkpoint-3/trainer_state.json"
    state = json.loads(path.read_text())
    state["log_history"] = [{"step": 3, "loss": 1.25, "grad_norm": 1.0, "epoch": 1.0, "learning_rate": 0.1}]
    path.write_text(json.dumps(state | {"total_flos": 12345.0}))
    (run / "metrics.jsonl").write_text('{"step": 3, "loss": 1.25, "grad_norm": 1.0, "tokens": 77.0}\n')
    longer = private_recipe(tmp_path, {"noise_multiplier": 1.0}, **SETTINGS | {"max_steps": 4})
    run_training(make_model(), TOKENIZER, longer, resume=True)
    texts = [(run / name).read_text() for name in ("metrics.jsonl", "checkpoint-4/trainer_state.json")]
    for text in texts:
        # As values: the digits alone may turn up in a noisy number.
        assert "loss" not in text and ": 77.0" not in text and ": 12345.0" not in text
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl")] == [3, 4]


def test_a_copy_of_the_ledger_does_not_name_the_dataset_and_can_be_put_back(tmp_path: Path) -> None:
    first, other = Subject("ab" * 32, 1000, 1e-4), Subject("cd" * 32, 1000, 1e-4)
    step, copies = Mechanism(5.0, 0.3), []
    for number, subject in enumerate((first, other)):
        with PrivacyLedger(tmp_path / f"ledger-{number}", subject) as ledger:
            ledger.spend(step, note="step 1")
            ledger.copy_to(tmp_path / f"copy-{number}")
        copies.append((tmp_path / f"copy-{number}").read_bytes())
    assert copies[0] == copies[1]
    shutil.copyfile(tmp_path / "copy-0", tmp_path / "ledger-0")
    with PrivacyLedger(tmp_path / "ledger-0", first) as ledger:
        assert ledger.releases == 1
        ledger.spend(step)
    with PrivacyLedger(tmp_path / "ledger-0", first) as ledger:
        ledger.require(tmp_path / "copy-0")
        assert ledger.releases == 2
        ledger.copy_to(tmp_path / "copy-2")
    assert b"ab" * 32 not in (tmp_path / "copy-2").read_bytes()
    with pytest.raises(PrivacyError, match="about another dataset"):
        PrivacyLedger(tmp_path / "ledger-0", other)
