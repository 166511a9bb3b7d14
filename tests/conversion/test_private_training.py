"""Private LoRA training of a polynomial plan through the encrypted worker, and the recipe's keys that name its functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hecompile.compiler import CLIENT, WORKER, CompileOptions, compile_checkpoint
from hecompile.errors import InputError
from models import REDUCED_POLYNOMIAL
from runtime.metrics import METRICS_FILE, read_metrics
from runtime.recipe import Recipe
from runtime.session import open_session
from runtime.train import run_training
from tests.conversion.support import TEXT

FUNCTIONS = {"attention": "gaussian_kernel", "norm": "polynomial", "activation": "polynomial"}


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("polynomial") / "build"
    compile_checkpoint(str(REDUCED_POLYNOMIAL), out, CompileOptions(batch_size=16, sequence_buckets=(14,)))
    return out


def recipe(build: Path, out: Path, **functions: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": build / CLIENT, "worker": "inprocess", "worker_bundle": build / WORKER, "engine": "torch",
            "data": {"train_file": TEXT / "private-train.jsonl"},
            "training": {
                "output_dir": out, "max_steps": 12, "per_device_train_batch_size": 16, "learning_rate": 1e-2,
                "logging_steps": 1, "disable_tqdm": True, "seed": 3,
            },
            **functions,
        }
    )  # fmt: skip


def test_the_loss_falls_and_the_adapter_is_saved(build: Path, tmp_path: Path) -> None:
    wanted = recipe(build, tmp_path / "run", **FUNCTIONS)
    with open_session(wanted) as session:
        result = run_training(session.model, session.tokenizer, wanted)
    losses = [record["loss"] for record in read_metrics(tmp_path / "run" / METRICS_FILE) if "loss" in record]
    assert len(losses) == 12
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    weights = load_file(result.adapter_dir / "adapter_model.safetensors")
    assert any(torch.count_nonzero(value) for name, value in weights.items() if "lora_B" in name)


@pytest.mark.parametrize(("part", "name"), [("attention", "softmax"), ("norm", "rmsnorm"), ("activation", "silu")])
def test_a_recipe_that_means_another_function_is_refused(build: Path, tmp_path: Path, part: str, name: str) -> None:
    wanted = recipe(build, tmp_path / "run", **(FUNCTIONS | {part: name}))
    with (
        open_session(wanted) as session,
        pytest.raises(InputError, match=f"{part} is {name} but the model was compiled with {FUNCTIONS[part]}"),
    ):
        run_training(session.model, session.tokenizer, wanted)
    assert not (tmp_path / "run").exists()
