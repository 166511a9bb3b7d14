from __future__ import annotations

import json
import math
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from hecompile.errors import HecompileError, InputError
from hecompile.runtime.model.plaintext import PlaintextPeftModel
from hecompile.runtime.training import trainer as trainer_module
from hecompile.runtime.training.metrics import read_metrics
from hecompile.runtime.training.train import run_training
from tests.support.training import RECORDS, SECRET, make_model, make_recipe, make_tokenizer

TOKENIZER = make_tokenizer()
STEP_KEYS = {
    "step", "epoch", "loss", "learning_rate", "grad_norm", "seconds", "tokens", "client_crypto_seconds",
    "worker_seconds", "wire_seconds", "bytes_up", "bytes_down", "repeated_rows", "overlapped_seconds",
}  # fmt: skip


def record_batches(model: PlaintextPeftModel) -> list[torch.Tensor]:
    """Collect the input_ids of each training forward."""
    batches: list[torch.Tensor] = []

    def hook(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if module.training:
            batches.append(kwargs["input_ids"])

    model.register_forward_pre_hook(hook, with_kwargs=True)
    return batches


def steps(directory: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(directory / "metrics.jsonl") if "loss" in record]


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if not key.endswith("seconds")} for record in records]


def assert_same_adapter(one: PlaintextPeftModel, other: PlaintextPeftModel) -> None:
    for key, value in one.adapter_state().items():
        assert torch.equal(value, other.adapter_state()[key]), key


def test_a_run_resumed_at_step_3_equals_the_run_that_did_not_stop(tmp_path: Path) -> None:
    # An epoch of 10 examples has 5 steps here, so that step 3 is in the middle of one and step 6 in the next.
    accumulation = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    recipe = make_recipe(tmp_path, eval_steps=2, **accumulation)
    straight = make_model(dropout=0.1)
    result = run_training(straight, TOKENIZER, recipe)
    assert result.steps == 6
    expected = read_metrics(tmp_path / "run/metrics.jsonl")
    shutil.rmtree(tmp_path / "run/checkpoint-6")  # as if it had been killed after step 5

    resumed = make_model(dropout=0.1)
    resumed.load_adapter_state({key: torch.zeros_like(value) for key, value in resumed.adapter_state().items()})
    again = run_training(resumed, TOKENIZER, recipe, resume=True)
    assert again.metrics == result.metrics
    assert_same_adapter(straight, resumed)
    actual = read_metrics(tmp_path / "run/metrics.jsonl")
    assert without_times(actual) == without_times(expected)
    assert [record["step"] for record in actual if "eval_loss" in record] == [2, 4, 6]


def test_the_data_order_depends_on_data_seed_and_on_nothing_else(tmp_path: Path) -> None:
    orders = []
    for number, (seed, data_seed, dropout) in enumerate([(1, 5, 0.0), (2, 5, 0.3), (1, 6, 0.0)]):
        directory = tmp_path / str(number)
        directory.mkdir()
        model = make_model(dropout)
        batches = record_batches(model)
        run_training(model, TOKENIZER, make_recipe(directory, seed=seed, data_seed=data_seed, save_strategy="no"))
        orders.append([batch.tolist() for batch in batches])
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


def test_each_step_is_logged_in_full_and_a_micro_batch_counts_by_its_tokens(tmp_path: Path) -> None:
    """With accumulation the loss and the gradient are those of one batch of all the step's examples."""
    recipe = make_recipe(tmp_path, max_steps=2, gradient_accumulation_steps=2, max_grad_norm=0, warmup_steps=0)
    model = make_model()
    reference = make_model()
    batches = record_batches(model)
    run_training(model, TOKENIZER, recipe)

    records = steps(tmp_path / "run")
    assert [record["step"] for record in records] == [1, 2]
    assert all(record.keys() == STEP_KEYS for record in records)
    tokenized = {len(r["completion"]) + 1 for r in RECORDS}
    assert len(tokenized) > 1, "the completions must differ in length for this test to mean anything"
    total, count = torch.tensor(0.0), 0
    for ids in batches[:2]:
        for row in ids:
            row = row[row != 0]
            start = row.tolist().index(TOKENIZER.convert_tokens_to_ids(":")) + 1
            logits = reference(row[None], torch.ones_like(row[None])).logits[0, start - 1 : -1]
            total = total + cross_entropy(logits, row[start:], reduction="sum")
            count += len(row) - start
    (total / count).backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in reference.adapter_state().values()))
    assert math.isclose(records[0]["loss"], total.item() / count, rel_tol=1e-5)
    assert math.isclose(records[0]["grad_norm"], norm, rel_tol=1e-4)
    attended = sum(int((ids != 0).sum()) for ids in batches[:2])
    assert records[0]["tokens"] == attended
    for record in records:
        assert record["loss"] == torch.tensor(record["loss"], dtype=torch.float32).item(), "rounded to decimals"


def test_schedule_warm_up_and_update_are_adamw_with_the_recipes_values(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, max_steps=4, warmup_steps=2, weight_decay=0.1, max_grad_norm=0.5, adam_beta2=0.9)
    model, reference = make_model(), make_model()
    batches = record_batches(model)
    run_training(model, TOKENIZER, recipe)
    rates = [record["learning_rate"] for record in steps(tmp_path / "run")]
    assert rates == pytest.approx([0.0, 2.5e-3, 5e-3, 2.5e-3])

    optimizer = torch.optim.AdamW(reference.adapter_state().values(), lr=0.0, betas=(0.9, 0.9), weight_decay=0.1)
    colon = TOKENIZER.convert_tokens_to_ids(":")
    for rate, ids in zip(rates, batches, strict=True):
        labels = torch.where(ids == 0, -100, ids)
        for row in labels:
            row[: row.tolist().index(colon) + 1] = -100
        reference(ids, (ids != 0).long(), labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.adapter_state().values(), 0.5)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    for key, value in reference.adapter_state().items():
        torch.testing.assert_close(model.adapter_state()[key], value, rtol=1e-4, atol=1e-6)


def test_training_lowers_the_held_out_loss_and_reports_it(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, max_steps=12, eval_on_start=True, learning_rate=2e-2, save_strategy="no")
    result = run_training(make_model(), TOKENIZER, recipe)
    evaluations = [record for record in read_metrics(tmp_path / "run/metrics.jsonl") if "eval_loss" in record]
    assert [record["step"] for record in evaluations] == [0, 12]
    assert evaluations[1]["eval_loss"] < evaluations[0]["eval_loss"] - 1.0
    assert result.metrics["eval_loss"] == evaluations[1]["eval_loss"]
    assert result.metrics.keys() == {"loss", "eval_loss", "eval_exact_match"}
    assert result.adapter_dir == tmp_path / "run/adapter"


def test_a_run_leaves_checkpoints_metrics_and_adapter_and_no_text(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(tmp_path, save_steps=2, save_total_limit=2, disable_tqdm=False)
    run_training(make_model(), TOKENIZER, recipe)
    run = tmp_path / "run"
    assert sorted(path.name for path in run.iterdir()) == ["adapter", "checkpoint-4", "checkpoint-6", "metrics.jsonl"]
    assert (run / "adapter/adapter_model.safetensors").read_bytes() == (
        run / "checkpoint-6/adapter_model.safetensors"
    ).read_bytes()
    output = capfd.readouterr()
    assert "6/6" in output.err and "loss=" in output.err
    for text in (output.out, output.err, (run / "metrics.jsonl").read_text()):
        assert SECRET not in text
    for path in run.rglob("*.json"):
        assert SECRET not in path.read_text(), path


def test_a_kill_while_saving_leaves_the_checkpoint_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = trainer_module.AdapterTrainer._save_rng_state

    def killed(self: Any, output_dir: str) -> None:
        if self.state.global_step == 6:
            raise KeyboardInterrupt
        real(self, output_dir)

    recipe = make_recipe(tmp_path)
    monkeypatch.setattr(trainer_module.AdapterTrainer, "_save_rng_state", killed)
    with pytest.raises(KeyboardInterrupt):
        run_training(make_model(), TOKENIZER, recipe)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]

    resumed = make_model()
    run_training(resumed, TOKENIZER, recipe, resume=True)
    straight_dir = tmp_path / "straight"
    straight_dir.mkdir()
    straight = make_model()
    run_training(straight, TOKENIZER, make_recipe(straight_dir))
    assert_same_adapter(straight, resumed)
    assert not list((tmp_path / "run").glob(".*"))


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_step_that_is_not_finite_stops_the_run_before_it_is_taken(tmp_path: Path, poison: str) -> None:
    model = make_model()
    calls = []

    def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
        calls.append(1)
        if len(calls) == 5:
            if poison == "loss":
                output.loss = output.loss * float("nan")
            else:
                output.loss.register_hook(lambda gradient: gradient * float("inf"))

    model.register_forward_hook(hook)
    with pytest.raises(HecompileError, match=r"step 5: the .* the step was not taken"):
        run_training(model, TOKENIZER, make_recipe(tmp_path))
    assert len(steps(tmp_path / "run")) == 4
    assert all(torch.isfinite(value).all() for value in model.adapter_state().values())


@pytest.mark.parametrize(
    ("training", "options", "message"),
    [
        ({"per_device_train_batch_size": 5}, {}, "per_device_train_batch_size is 5 but the model takes"),
        ({"per_device_eval_batch_size": 5}, {}, "per_device_eval_batch_size is 5 but the model takes"),
        ({"per_device_train_batch_size": 4}, {"max_batch_tokens": 96}, "so a batch has 128, but the model takes"),
        ({}, {"sequence_buckets": (8,)}, r"train\.jsonl, line 1: prompt has 7 tokens and completion 11"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_anything_is_written(
    tmp_path: Path, training: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run_training(make_model(**options), TOKENIZER, make_recipe(tmp_path, **training))
    assert not (tmp_path / "run").exists()


def test_an_output_directory_with_a_run_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    run_training(make_model(), TOKENIZER, make_recipe(tmp_path, max_steps=2))
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"already holds a run .* training\.overwrite_output_dir=true"):
        run_training(make_model(), TOKENIZER, make_recipe(tmp_path, max_steps=1))
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    run_training(make_model(), TOKENIZER, make_recipe(tmp_path, max_steps=1, overwrite_output_dir=True))
    assert len(steps(tmp_path / "run")) == 1
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]


def test_an_output_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"output_dir .*file/run cannot be used: Not a directory; name another"):
        run_training(make_model(), TOKENIZER, make_recipe(tmp_path, output_dir=tmp_path / "file/run"))
    with pytest.raises(InputError, match=r"output_dir /proc/run cannot be used: .*; name another"):
        run_training(make_model(), TOKENIZER, make_recipe(tmp_path, output_dir=Path("/proc/run")))


def test_a_run_opens_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert run_training(make_model(), TOKENIZER, make_recipe(tmp_path, max_steps=1)).steps == 1


def test_a_torn_last_line_of_the_metrics_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "loss": 2.5}) + '\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.5}]


@pytest.mark.parametrize("line", ["{", "[]", '{"loss": 1}', "[" * 100_000, '{"step": ' + "7" * 5000 + "}", "caf\xe9"])
def test_a_damaged_line_of_the_metrics_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n', encoding="latin-1")
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2: damaged, not a record of a step; delete the line"):
        read_metrics(path)
