"""The benchmark on a real model: what it measures is the plan that an export makes, and what it compares is right."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks.training import real_model
from benchmarks.training.precision_real import Row, kept_rows
from benchmarks.training.real_model import FOLDER, Gradients, RealModel
from benchmarks.training.rounded_plan import MeasuredPlan, RoundedModel, calibrated, split_plan
from hecompile.compiler.pipeline import lower_linear
from hecompile.errors import InputError
from tests.support.tiny import OPTIONS, exported, samples, tiny_llama


def test_a_folder_without_a_checkpoint_is_named_and_none_means_that_it_is_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    for folder in (None, tmp_path):
        with pytest.raises(InputError, match=f"{FOLDER}=.*set it to the folder of a Llama checkpoint"):
            RealModel(folder)
    monkeypatch.delenv(FOLDER)
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(real_model, "real_checkpoint", lambda folder: tmp_path)
    assert RealModel().folder == tmp_path


def test_gradients_are_compared_by_direction_and_length() -> None:
    exact = Gradients(1.0, {"a": torch.tensor([[3.0, 4.0]]), "b": torch.tensor([[1.0, 0.0]])})
    own = Gradients(1.0, {"a": torch.tensor([[6.0, 8.0]]), "b": torch.tensor([[0.0, 0.5]])})
    assert own.cosines(exact).tolist() == pytest.approx([1.0, 0.0])
    assert own.lengths(exact).tolist() == pytest.approx([1.0, 0.5])


def test_a_rounded_plan_has_the_loss_of_the_model_and_differentiable_adapters() -> None:
    tokens = torch.tensor([[5, 200, 31, 7, 90, 14], [9, 8, 7, 6, 5, 4]])
    plan, _ = lower_linear(exported(), dataclasses.replace(OPTIONS, weight_bits=12), samples())
    measured = MeasuredPlan.rounded(plan)
    assert isinstance(measured.model, RoundedModel) and measured.two_byte_share == 1
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    assert Gradients.of(measured.model, batch).loss == pytest.approx(tiny_llama()(**batch).loss.item(), abs=0.01)
    state = {name: torch.full_like(matrix, 0.1) for name, matrix in measured.model.adapter_state().items()}
    measured.model.load_adapter_state(state)
    gradients = Gradients.of(measured.model, batch).matrices
    assert gradients.keys() == state.keys() and all(float(matrix.norm()) > 0 for matrix in gradients.values())


def test_the_share_of_two_bytes_goes_with_the_budget() -> None:
    base = calibrated(exported(), samples(), rotated=True, feedback=True)
    budgets = [1.0, *(2.0**-power for power in range(10, 16)), 0.0]
    shares = [MeasuredPlan.rounded(split_plan(base.clone(), "auto", budget)).two_byte_share for budget in budgets]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1 and any(0 < share < 1 for share in shares)
    one, two = (MeasuredPlan.rounded(split_plan(base.clone(), bits)) for bits in (8, 12))
    assert one.worker_seconds_per_token < two.worker_seconds_per_token and one.bytes_per_token <= two.bytes_per_token


def test_a_kept_row_is_used_for_the_losses_that_it_was_measured_at_alone(tmp_path: Path) -> None:
    rows = {name: Row(1.0, 10, 2.0, loss, loss, 0.9, 0.99, 1, 0.1, 2) for name, loss in {"chat": 2.0, "prose": 5.0}.items()}
    path = tmp_path / "nearest-8.json"
    assert kept_rows(path, {"chat": 2.0, "prose": 5.0}) is None
    path.write_text(json.dumps({name: dataclasses.asdict(row) for name, row in rows.items()}))
    assert kept_rows(path, {"chat": 2.00001, "prose": 5.0}) == rows
    assert kept_rows(path, {"chat": 2.0, "prose": 5.01}) is None
    assert kept_rows(path, {"chat": 2.0}) is None
