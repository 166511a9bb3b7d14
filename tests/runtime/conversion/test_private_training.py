"""Private LoRA training of a polynomial plan through the encrypted worker, and the recipe's keys that name its functions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hecompile.bundles.kinds import CLIENT, WORKER
from hecompile.compiler.ckks import CkksOptions, lower_checkpoint, merged_checkpoint
from hecompile.compiler.frontend import load_checkpoint
from hecompile.compiler.linear import CompileOptions, compile_checkpoint
from hecompile.errors import InputError, LegalityError, NotFiniteError
from hecompile.graph.ir import attributes_of, module_path
from hecompile.models import REDUCED_POLYNOMIAL
from hecompile.runtime.client.functions import check_functions
from hecompile.runtime.client.session import open_session
from hecompile.runtime.model.adapter import load_adapter
from hecompile.runtime.model.data import PadToBucket, eos_and_pad, load_examples
from hecompile.runtime.model.evaluation import evaluate
from hecompile.runtime.recipes.training import Recipe
from hecompile.runtime.training.metrics import METRICS_FILE, read_metrics
from hecompile.runtime.training.train import run_training
from tests.runtime.conversion.support import TEXT
from tests.support.training import make_model

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
    """What is merged can be exported as a graph of polynomials; at the same rate without it, it can not.

    At this rate every run does so: in 30 with it the variance before the head stayed below 3.2, in 16 without it it passed
    4.2, and the domain ends at 3.9. At twice the rate a run now and then leaves it in spite of the range loss.
    """
    options = CkksOptions(14)
    for name, section in (("without", {}), ("with", {"range_loss": {"alpha": 100.0, "beta": 100.0}})):
        adapter = trained(build, tmp_path / name, 5e-3, 40, **section)
        merged = merged_checkpoint(load_checkpoint(str(REDUCED_POLYNOMIAL)), adapter)
        if name == "without":
            with pytest.raises(LegalityError, match=r"was seen between .* outside the domain"):
                lower_checkpoint(merged, options)
        else:
            assert lower_checkpoint(merged, options)[2] > 0


def test_range_loss_is_refused_where_it_has_no_meaning(build: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="range_loss is for plans with polynomials"):
        check_functions(recipe(build, tmp_path, range_loss={}), make_model())
    with pytest.raises(ValueError, match="range_loss is a term of a whole batch"):
        recipe(build, tmp_path, range_loss={}, privacy={"epsilon": 8.0, "delta": 1e-5, "max_grad_norm": 1.0})


def test_a_rate_far_too_high_ends_with_what_left_which_domain(build: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    wanted = recipe(build, run)
    wanted = wanted.model_copy(
        update={"training": wanted.training.model_copy(update={"learning_rate": 0.1, "save_steps": 1})}
    )
    with open_session(wanted) as session:
        with pytest.raises(NotFiniteError) as caught:
            run_training(session.model, session.tokenizer, wanted)
        graph = session.model.bundle.graph()
        taken = [record["step"] for record in read_metrics(run / METRICS_FILE)]
        assert taken, "it failed in its first step, before there was anything to keep"
        for step in taken:
            load_adapter(session.model, run / f"checkpoint-{step}")  # which refuses what is not finite
        heldout = load_examples(TEXT / "private-heldout.jsonl", session.tokenizer, session.model.sequence_buckets)
        with pytest.raises(NotFiniteError, match=r"^on held-out text .*: model\.layers\.0\..* domain \["):
            evaluate(session.model, heldout, eos_and_pad(session.tokenizer)[1])
    message = str(caught.value)
    assert message.startswith(f"step {taken[-1] + 1}: a value to encrypt is infinite or NaN")
    assert "the step was not taken" in message and "lower training.learning_rate" in message
    domains = {module_path(node): attributes_of(node) for node in graph.graph if "error_bound" in node.attributes}
    for cause in caught.value.causes:
        found = re.fullmatch(r"(\S+): the \w+ between (\S+) and (\S+), domain \[(\S+), (\S+)\]", cause)
        assert found is not None, cause
        lower, upper, *domain = map(float, found.groups()[1:])
        wanted_domain = [domains[found[1]][f"domain_{end}"] for end in ("lower", "upper")]
        assert domain == pytest.approx(wanted_domain, rel=1e-4, abs=1e-6)
        assert lower < domain[0] or upper > domain[1]
    assert caught.value.causes[0] in message and "norm.margin" in message
    words = set(re.findall(r"[a-z]{4,}", (TEXT / "private-train.jsonl").read_text(encoding="utf-8").lower()))
    assert not words & set(re.findall(r"[a-z]+", message.lower()))


def test_what_left_a_domain_is_looked_for_in_every_packed_sequence_by_itself(build: Path, tmp_path: Path) -> None:
    with open_session(recipe(build, tmp_path / "run")) as session:
        model = session.model
        examples = load_examples(TEXT / "private-train.jsonl", session.tokenizer, model.sequence_buckets).examples[:4]
        batch = PadToBucket(model.sequence_buckets, eos_and_pad(session.tokenizer)[1])([one.item() for one in examples])
        assert model.outside_domains(**batch) == ()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, value in model.adapter_state().items():
                if "q_proj.lora_B" in name:
                    value.copy_(torch.randn(value.shape, generator=generator))
        found = model.outside_domains(**batch)
        alone = [model.outside_domains(**{key: value[i : i + 1] for key, value in batch.items()}) for i in range(4)]
    assert [one.what for one in found][:1] == ["the exponent"] and found[0].where == "model.layers.0.self_attn"
    ranges = [each[0].seen for each in alone]
    assert found[0].seen.lower == pytest.approx(min(one.lower for one in ranges), rel=1e-2)
    assert found[0].seen.upper == pytest.approx(max(one.upper for one in ranges), rel=5e-2)


@pytest.mark.parametrize(("part", "name"), [("attention", "chebyshev"), ("norm", "exact"), ("activation", "exact")])
def test_a_recipe_that_means_another_function_is_refused(build: Path, tmp_path: Path, part: str, name: str) -> None:
    wanted = recipe(build, tmp_path / "run", **(FUNCTIONS | {part: name}))
    with (
        open_session(wanted) as session,
        pytest.raises(InputError, match=f"{part} is {name} but the model was compiled with {FUNCTIONS[part]}"),
    ):
        run_training(session.model, session.tokenizer, wanted)
    assert not (tmp_path / "run").exists()
