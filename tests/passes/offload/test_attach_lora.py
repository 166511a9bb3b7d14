"""Attaching LoRA branches: text, meaning with and without an adapter, what is left alone, what is refused."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch

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
    ],
)
def test_refused_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AttachLora(**options)


def test_boundary_options() -> None:
    assert AttachLora(r=1, lora_dropout=0.0).target_modules == LLAMA_LINEARS
