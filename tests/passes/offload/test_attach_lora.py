"""Attaching LoRA branches: text, meaning with and without an adapter, what is left alone, what is refused."""

from __future__ import annotations

import onnx_ir as ir
import peft
import pytest
import torch
from peft.tuners.tuners_utils import check_target_module_exists

from hecompile.checkpoint.families import LLAMA_LINEARS
from hecompile.errors import InputError
from hecompile.graph.ir import print_model
from hecompile.graph.legality import ADAPTED
from hecompile.passes.offload.attach_lora import AttachLora
from tests.conftest import Golden
from tests.support.graphs import evaluate, integers, parse, refused, run_pass

TEXT = """
block (float[B,S,3] x) => (float[B,S,3] y)
<float[2,3] wq = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}, float[3,2] wo = {1.0, 0.0, 0.0, 1.0, 1.0, 1.0}, float[B,S,2] q>
{
    q = hecompile.Linear (x, wq)
    y = hecompile.Linear (q, wo)
}
"""
Q_PATH, O_PATH = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"
LORA_A, LORA_B = f"base_model.model.{Q_PATH}.lora_A.weight", f"base_model.model.{Q_PATH}.lora_B.weight"


def block(q: str = Q_PATH) -> ir.Model:
    return parse(TEXT, {"q": q, "y": O_PATH})


def test_golden(golden: Golden) -> None:
    model, x = block(), integers(2, 3, 3)
    before = evaluate(model, x=x)
    result = run_pass(model, "attach_lora", ADAPTED, r=4, lora_alpha=8.0, lora_dropout=0.25, target_modules=("q_proj",))
    assert result.modified
    golden.check("attach_lora", print_model(result.model))
    a, b = integers(4, 3, seed=1), integers(2, 4, seed=2)
    assert torch.equal(evaluate(model, x=x, **{LORA_A: a, LORA_B: torch.zeros(2, 4)}), before)
    wq, wo = (torch.from_numpy(model.graph.initializers[name].const_value.numpy()) for name in ("wq", "wo"))
    merged = x @ (wq + 2.0 * b @ a).T @ wo.T  # lora_alpha / r = 2
    assert torch.equal(evaluate(model, x=x, **{LORA_A: a, LORA_B: b}), merged)


def test_untouched_is_a_linear_that_is_no_target() -> None:
    model = block()
    run_pass(model, "attach_lora", ADAPTED, target_modules=("q_proj",))
    assert f"%y: f32[B,S,3] = hecompile.Linear(%q, %wo)  # {O_PATH}\n" in print_model(model)


def test_refused_target_that_the_model_does_not_have() -> None:
    error = refused(block(), "attach_lora", ADAPTED, target_modules=("q_proj", "v_proj"))
    assert isinstance(error, InputError)
    assert str(error) == "target module 'v_proj' does not exist in this model"


def test_boundary_a_module_whose_name_only_ends_alike_is_no_target() -> None:
    error = refused(block("model.layers.0.self_attn.kq_proj"), "attach_lora", ADAPTED, target_modules=("q_proj",))
    assert "'q_proj' does not exist" in str(error)


FOUR = """
blocks (float[B,S,2] x) => (float[B,S,2] y)
<float[2,2] w = {1.0, 2.0, 3.0, 4.0}, float[B,S,2] a, float[B,S,2] b, float[B,S,2] c>
{
    a = hecompile.Linear (x, w)
    b = hecompile.Linear (a, w)
    c = hecompile.Linear (b, w)
    y = hecompile.Linear (c, w)
}
"""
PATHS = {
    "a": "model.layers.0.q_proj", "b": "model.layers.1.q_proj", "c": "model.layers.12.mlp.experts.1.q_proj",
    "y": "vision.blocks.1.q_proj",
}  # fmt: skip


@pytest.mark.parametrize(
    ("layers", "pattern", "adapted"),
    [
        (None, None, "abcy"), ((1,), None, "by"), ((1,), ("layers",), "b"), ((1,), ("h", "blocks"), "y"),
        ((12, 0), None, "ac"), ((0, 12), ("layers",), "ac"),
    ],
)  # fmt: skip
def test_layers_are_pefts(layers: tuple[int, ...] | None, pattern: tuple[str, ...] | None, adapted: str) -> None:
    """The first number of a path is the layer's, not that of an expert in it; PEFT itself would take the same modules."""
    options = {"target_modules": ("q_proj",), "layers_to_transform": layers, "layers_pattern": pattern}
    model = run_pass(parse(FOUR, PATHS), "attach_lora", ADAPTED, **options).model
    found = {str(value.name).removesuffix(".lora_A.weight") for value in model.graph.inputs if "lora_A" in str(value.name)}
    assert found == {f"base_model.model.{PATHS[name]}" for name in adapted}
    config = peft.LoraConfig(**options)  # type: ignore[arg-type]
    assert all(bool(check_target_module_exists(config, PATHS[name])) == (name in adapted) for name in PATHS)


@pytest.mark.parametrize(("layers", "pattern"), [((1, 2), None), ((12,), ("blocks",))])
def test_refused_layer_that_the_model_does_not_have(layers: tuple[int, ...], pattern: tuple[str, ...] | None) -> None:
    error = refused(
        parse(FOUR, PATHS), "attach_lora", ADAPTED,
        target_modules=("q_proj",), layers_to_transform=layers, layers_pattern=pattern,
    )  # fmt: skip
    where = "" if pattern is None else " under blocks (layers_pattern)"
    expected = f"layers_to_transform: layer {layers[-1]} does not exist in this model{where}, or has no target module"
    assert str(error) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "LoRA r must be at least 1, got 0"),
        ({"lora_dropout": 1.0}, r"LoRA dropout must be in \[0, 1\), got 1.0"),
        ({"lora_dropout": -0.1}, r"LoRA dropout must be in \[0, 1\), got -0.1"),
        ({"lora_alpha": float("nan")}, "LoRA alpha must be finite, got nan"),
        ({"lora_alpha": float("inf")}, "LoRA alpha must be finite, got inf"),
        ({"target_modules": ()}, "target_modules is empty"),
        ({"target_modules": ("q_proj", "q_porj")}, "target module 'q_porj' does not exist; choose from q_proj"),
        ({"target_modules": ("lm_head",)}, "target module 'lm_head' does not exist"),
        ({"layers_to_transform": ()}, r"layers_to_transform must be different indices from 0 on, got \[\]"),
        ({"layers_to_transform": (1, 1)}, r"different indices from 0 on, got \[1, 1\]"),
        ({"layers_to_transform": (-1,)}, r"different indices from 0 on, got \[-1\]"),
        ({"layers_pattern": ("layers",)}, "layers_pattern says where layers_to_transform counts: give that as well"),
        ({"layers_to_transform": (0,), "layers_pattern": ("(",)}, r"layers_pattern must be names .*, got \['\('\]"),
    ],
)
def test_refused_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AttachLora(**options)


def test_boundary_options() -> None:
    assert AttachLora(r=1, lora_dropout=0.0).target_modules == LLAMA_LINEARS
