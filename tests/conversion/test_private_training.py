"""Private LoRA training of a polynomial plan through the encrypted worker, and the recipe's keys that name its functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hecompile.ckks.bundle import CkksOptions, lower_polynomial, merged_checkpoint
from hecompile.compiler import CLIENT, WORKER, CompileOptions, compile_checkpoint
from hecompile.errors import InputError, LegalityError
from hecompile.frontend import load_checkpoint
from models import REDUCED_POLYNOMIAL
from runtime.functions import check_functions
from runtime.metrics import METRICS_FILE, read_metrics
from runtime.recipe import Recipe
from runtime.session import open_session
from runtime.train import run_training
from tests.conversion.support import TEXT
from tests.training.support import make_model

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


def trained(build: Path, out: Path, rate: float, steps: int, **changes: Any) -> Path:
    wanted = recipe(build, out, **changes)
    section = wanted.training.model_copy(update={"learning_rate": rate, "max_steps": steps, "save_steps": 2})
    wanted = wanted.model_copy(update={"training": section})
    with open_session(wanted) as session:
        return run_training(session.model, session.tokenizer, wanted).adapter_dir


def test_range_loss_keeps_the_adapted_model_within_the_domains(build: Path, tmp_path: Path) -> None:
    """What is merged can be exported as a graph of polynomials; at the same rate without it, it can not."""
    options = CkksOptions(14)
    for name, section in (("without", {}), ("with", {"range_loss": {"alpha": 10.0, "beta": 10.0}})):
        adapter = trained(build, tmp_path / name, 1e-2, 40, **section)
        merged = merged_checkpoint(load_checkpoint(str(REDUCED_POLYNOMIAL)), adapter)
        if name == "without":
            with pytest.raises(LegalityError, match=r"was seen between .* outside the domain"):
                lower_polynomial(merged, options)
        else:
            assert lower_polynomial(merged, options)[2] > 0


def test_a_run_that_leaves_the_domains_names_the_node_and_keeps_its_checkpoints(build: Path, tmp_path: Path) -> None:
    with pytest.raises(
        LegalityError,
        match=r"step \d+: model\.\S+: the \w+ went from .* outside the domain \[.*\] of its polynomial, and .*; the step "
        r"was not taken\. Lower learning_rate, give range_loss",
    ):
        trained(build, tmp_path / "run", 0.05, 40)
    checkpoints = sorted(tmp_path.glob("run/checkpoint-*/adapter_model.safetensors"))
    assert checkpoints and all(bool(value.isfinite().all()) for value in load_file(checkpoints[-1]).values())


def test_range_loss_is_refused_where_it_has_no_meaning(build: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="range_loss is for plans with polynomials"):
        check_functions(recipe(build, tmp_path, range_loss={}), make_model())
    with pytest.raises(ValueError, match="range_loss is a term of a whole batch"):
        recipe(build, tmp_path, range_loss={}, privacy={"epsilon": 8.0, "delta": 1e-5, "max_grad_norm": 1.0})


@pytest.mark.parametrize(("part", "name"), [("attention", "softmax"), ("norm", "rmsnorm"), ("activation", "silu")])
def test_a_recipe_that_means_another_function_is_refused(build: Path, tmp_path: Path, part: str, name: str) -> None:
    wanted = recipe(build, tmp_path / "run", **(FUNCTIONS | {part: name}))
    with (
        open_session(wanted) as session,
        pytest.raises(InputError, match=f"{part} is {name} but the model was compiled with {FUNCTIONS[part]}"),
    ):
        run_training(session.model, session.tokenizer, wanted)
    assert not (tmp_path / "run").exists()
