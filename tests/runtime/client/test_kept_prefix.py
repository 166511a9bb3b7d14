"""What is kept of the layers below the lowest adapter: nothing else changes, and the worker is not asked for it again."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from hecompile.bundles.client import ClientBundle
from hecompile.bundles.worker import WorkerBundle
from hecompile.compiler import linear as compiler
from hecompile.compiler.linear import compile_checkpoint
from hecompile.errors import InputError
from hecompile.passes.offload.attach_lora import AttachLora
from hecompile.runtime.client.encrypted_model import EncryptedCausalLM
from hecompile.runtime.client.products import CleartextProducts
from hecompile.runtime.model.adapter import load_adapter, save_adapter
from hecompile.runtime.model.data import Example, Examples, PadToBucket
from hecompile.runtime.model.evaluation import evaluate
from hecompile.runtime.recipes.prefix import PrefixCacheSection
from hecompile.runtime.training.train import run_training
from tests.support.tiny import OPTIONS, exported, save_checkpoint, tiny_llama
from tests.support.training import BUCKETS, make_recipe, make_tokenizer

LENGTHS = (9, 5, 16, 12)
TEXTS = [tuple((7 * row + 3 * place) % 250 + 3 for place in range(length)) for row, length in enumerate(LENGTHS)]
EXAMPLES = Examples([Example(text, 2, True) for text in TEXTS])
LORAS = {
    "upper": AttachLora(2, 4.0, layers_to_transform=(1,)),
    "everywhere": AttachLora(2, 4.0),
    "down": AttachLora(2, 4.0, target_modules=("down_proj",), layers_to_transform=(1,)),
}
Q, OUT, UP, DOWN = ("self_attn.q_proj-k_proj-v_proj", "self_attn.o_proj", "mlp.gate_proj-up_proj", "mlp.down_proj")


class Counting(CleartextProducts):
    """Count the rows that each circuit is asked for."""

    def __init__(self, *bundles: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            super().__init__(*bundles)
        self.rows: Counter[str] = Counter()

    def product(self, circuit: str, x: Tensor, *scales: Any, **named: Any) -> Tensor:
        self.rows[circuit.removeprefix("model.layers.")] += len(x)
        return super().product(circuit, x, *scales, **named)


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The random Llama of two layers, exported with each of LORAS."""
    top = tmp_path_factory.mktemp("prefix")
    checkpoint = save_checkpoint(top / "checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "export_onnx", lambda model: exported())
        for name, lora in LORAS.items():
            options = dataclasses.replace(OPTIONS, lora=lora, sequence_buckets=BUCKETS)
            compile_checkpoint(str(checkpoint), top / name, options)
    return {name: top / name for name in LORAS} | {"checkpoint": checkpoint}


def model_of(build: Path) -> EncryptedCausalLM:
    bundle = ClientBundle.open(build / "client")
    model = EncryptedCausalLM(bundle, Counting(bundle, WorkerBundle.open(build / "worker")))
    generator = torch.Generator().manual_seed(5)
    state = {name: 0.1 * torch.randn(value.shape, generator=generator) for name, value in model.adapter_state().items()}
    model.load_adapter_state(state)
    return model


def section(**settings: Any) -> PrefixCacheSection:
    return PrefixCacheSection.model_validate({"size": "1MB", "dtype": "float32"} | settings)


def step(model: EncryptedCausalLM, *places: int, kept: bool = True) -> tuple[dict[str, Tensor], Counter[str]]:
    """Take the gradients of a batch of EXAMPLES, and the rows that were asked for."""
    counting = model.products
    assert isinstance(counting, Counting)
    counting.rows = Counter()
    batch = PadToBucket((16,), 0, with_examples=kept)([EXAMPLES[place] for place in places])
    model.zero_grad()
    loss = model(**batch).loss
    assert loss is not None
    loss.backward()
    return {name: value.grad for name, value in model.adapter_state().items() if value.grad is not None}, counting.rows


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("upper", {f"1.{OUT}.forward", f"1.{UP}.forward", f"1.{DOWN}.forward"}),
        ("everywhere", {f"{at}.{part}.forward" for at in (0, 1) for part in (Q, OUT, UP, DOWN)} - {f"0.{Q}.forward"}),
        ("down", set()),
    ],
)
def test_gradients_are_the_same_and_the_worker_is_asked_once(builds: dict[str, Path], name: str, asked: set[str]) -> None:
    model = model_of(builds[name])
    expected, every = step(model, 0, 1, kept=False)
    with model.prefix.keep(section(), LENGTHS):
        first, rows = step(model, 0, 1)
        again, later = step(model, 0, 1)
        mixed, partly = step(model, 2, 1)
    other, _ = step(model, 2, 1, kept=False)
    assert expected and first.keys() == again.keys() == expected.keys()
    for matrix, gradient in expected.items():
        torch.testing.assert_close(first[matrix], gradient, rtol=1e-4, atol=1e-7)
        assert torch.equal(first[matrix], again[matrix])
        torch.testing.assert_close(mixed[matrix], other[matrix], rtol=1e-4, atol=1e-7)
    forward = {circuit for circuit in later if circuit.endswith(".forward")}
    assert forward == asked and {circuit for circuit in every if circuit.endswith(".backward")} == set(later) - forward
    assert all(rows[circuit] == every[circuit] for circuit in every if circuit.startswith("0."))
    once = {circuit for circuit in rows if circuit.endswith(".forward")} - forward
    assert {partly[circuit] for circuit in once} == {LENGTHS[2] - 1}  # of the one example that is new


def test_bfloat16_moves_gradients_by_its_rounding(builds: dict[str, Path]) -> None:
    model = model_of(builds["upper"])
    expected, _ = step(model, 0, 1, kept=False)
    with model.prefix.keep(section(dtype="bfloat16"), LENGTHS):
        rounded, _ = step(model, 0, 1)
    for matrix, gradient in expected.items():
        difference = float((rounded[matrix] - gradient).norm() / gradient.norm())
        assert 0 < difference < 0.02, f"{matrix}: {difference}"


def test_below_the_lowest_adapter_there_is_no_backward_circuit(builds: dict[str, Path]) -> None:
    circuits = ClientBundle.open(builds["upper"] / "client").circuits
    assert [name for name in circuits if name.endswith(".backward")] == [
        f"model.layers.1.{part}.backward" for part in (OUT, UP, DOWN)
    ]
    down = ClientBundle.open(builds["down"] / "client").circuits
    assert [name for name in down if name.endswith(".backward")] == []
    for suffix in ("checks", "hints"):
        stored = {path.name for path in (builds["upper"] / "client" / suffix).glob("*.backward*")}
        assert len(stored) == 3 and all(".layers.1." in name for name in stored)


def test_an_adapter_of_some_layers_is_pefts(builds: dict[str, Path], tmp_path: Path) -> None:
    model = model_of(builds["upper"])
    assert len(model.adapter_state()) == 2 * 7
    saved = save_adapter(model, tmp_path / "own")
    theirs = peft.PeftModel.from_pretrained(type(tiny_llama())(tiny_llama().config), saved)
    config = theirs.peft_config["default"]
    assert (config.layers_to_transform, config.layers_pattern) == ([1], None)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    other = model_of(builds["upper"])
    other.load_adapter_state({name: torch.zeros_like(value) for name, value in other.adapter_state().items()})
    load_adapter(other, tmp_path / "theirs")
    for name, value in model.adapter_state().items():
        assert torch.equal(value, other.adapter_state()[name])
    with pytest.raises(InputError, match=r"has no values for .*layers\.0"):
        load_adapter(model_of(builds["everywhere"]), tmp_path / "theirs")


def test_evaluations_keep_it_too(builds: dict[str, Path]) -> None:
    model = model_of(builds["upper"])
    plain = evaluate(model, EXAMPLES, 0)
    with model.prefix.keep(section(), LENGTHS):
        before = evaluate(model, EXAMPLES, 0)
        counting = model.products
        assert isinstance(counting, Counting)
        counting.rows = Counter()
        after = evaluate(model, EXAMPLES, 0)
    assert plain.loss == pytest.approx(before.loss, rel=1e-6) and before == after
    assert not any(circuit.startswith("0.") for circuit in counting.rows)


def test_gradients_per_example_are_the_same(builds: dict[str, Path]) -> None:
    model = model_of(builds["upper"])
    batch = PadToBucket((16,), 0, with_examples=True)([EXAMPLES[0], EXAMPLES[1]])
    expected = model.per_example_gradients(**batch).gradients
    with model.prefix.keep(section(), LENGTHS):
        model.per_example_gradients(**batch)
        for name, gradient in model.per_example_gradients(**batch).gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)


def test_training_asks_once_for_each_example(builds: dict[str, Path], tmp_path: Path) -> None:
    """Two epochs with an evaluation after each, kept in a file, are the two epochs of a run that keeps nothing."""
    states, rows = [], []
    for name in ("plain", "kept"):
        (tmp_path / name).mkdir()
        recipe = make_recipe(tmp_path / name, max_steps=-1, num_train_epochs=2, eval_strategy="epoch", save_strategy="no")
        if name == "kept":
            recipe = recipe.model_copy(update={"prefix_cache": section(directory=tmp_path)})
        model = model_of(builds["upper"])
        run_training(model, make_tokenizer(), recipe)
        assert isinstance(model.products, Counting) and not model.prefix.active
        states.append(model.adapter_state())
        rows.append(model.products.rows)
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-3, atol=1e-5)
    plain, kept = rows
    assert plain[f"1.{DOWN}.backward"] == kept[f"1.{DOWN}.backward"]
    assert all(plain[f"{at}.{part}.forward"] == 2 * kept[f"{at}.{part}.forward"] > 0 for at, part in ((0, DOWN), (1, Q)))


def test_equal_examples_are_each_asked_for(builds: dict[str, Path]) -> None:
    """What is kept goes by the example and not by its text: else the worker would see which are equal."""
    model, twin = model_of(builds["upper"]), dataclasses.replace(EXAMPLES.examples[1], number=-1 % 2**40)
    with model.prefix.keep(section(), LENGTHS):
        step(model, 0, 1)
        batch = PadToBucket((16,), 0, with_examples=True)([twin.numbered_item()])
        counting = model.products
        assert isinstance(counting, Counting)
        counting.rows = Counter()
        model(**batch)
    assert counting.rows[f"0.{Q}.forward"] == LENGTHS[1] - 1


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("upper", {"size": 100}, r"prefix_cache.size is 100 bytes, but the longest example of 16 tokens takes 2,048"),
        ("everywhere", {"size": 100}, r"the longest example of 16 tokens takes 4,096"),
        ("upper", {"directory": "/nowhere/at/all"}, r"prefix_cache.directory /nowhere/at/all cannot be used: No such file"),
    ],
)
def test_refused(builds: dict[str, Path], name: str, settings: dict[str, Any], message: str) -> None:
    model = model_of(builds[name])
    with pytest.raises(InputError, match=message), model.prefix.keep(section(**settings), LENGTHS):
        pass
    assert not model.prefix.active


def test_a_small_budget_keeps_hidden_states_rather_than_products(builds: dict[str, Path]) -> None:
    """32 features at the boundary, 64 of q, k and v: 42 tokens of 96 floats are 16 128 bytes."""
    for size, features in ((16_128, 96), (16_127, 32), (42 * 128, 32)):
        model = model_of(builds["upper"])
        with model.prefix.keep(section(size=size), LENGTHS):
            assert model.prefix.kept is not None
            _, rows = step(model, 0, 1)
            _, later = step(model, 0, 1)
        assert (f"1.{Q}.forward" in later) == (features == 32), size
        assert f"0.{Q}.forward" in rows and f"0.{Q}.forward" not in later


def test_what_does_not_fit_is_computed_again_and_said_once(
    builds: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of(builds["upper"])
    with model.prefix.keep(section(size=16 * 128), LENGTHS), caplog.at_level(logging.WARNING):
        for _ in range(2):
            _, rows = step(model, 0, 1)
            _, rows = step(model, 2, 3)
    assert rows[f"0.{Q}.forward"] == LENGTHS[2] + LENGTHS[3] - 2
    (line,) = [record.getMessage() for record in caplog.records if record.name.endswith("prefix_store")]
    assert line.startswith("prefix_cache: its 2,048 bytes are full. 2 examples are kept; the lower layers of all others")
