"""Cutting off what no adapter changes: text of both parts, meaning, what is left whole."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch

from hecompile.compiler.pipeline import PASSES
from hecompile.graph.interpreter import Interpreter
from hecompile.graph.ir import module_path, nodes_of_type, print_model
from hecompile.graph.legality import CLIENT_PLAN, check_stage
from hecompile.graph.operators import Context
from hecompile.passes.offload.cut_prefix import PrefixPlan
from tests.conftest import Golden
from tests.support.graphs import evaluate, integers, parse, run_pass

TEXT = """
model (int64[B,S] input_ids) => (float[B,S,2] y)
<float[3,2] table = {1.0, 2.0, -1.0, 0.5, 0.0, 3.0}, float[2] s2 = {1.0, 2.0}, float[4] s4 = {1.0, 1.0, 2.0, 0.5},
 float[2,2] w = {1.0, 2.0, 3.0, 4.0}, float[B,S,2] x0, float[B,S,2] d, float[B,S,2] x1, float[B,S,2] e, float[B,S,4] g,
 float[B,S,2] t, float[B,S,2] x2, int64[2] sizes = {2, 2}, float[B,S,2] g0, float[B,S,2] g1>
{
    x0 = Gather (table, input_ids)
    d = hecompile.RemoteLinear <linear: string = "layers.0.o"> (x0, s2)
    x1 = Add (x0, d)
    e = Mul (x1, x1)
    g = hecompile.RemoteLinear <linear: string = "layers.1.gate-up"> (e, s4)
    g0, g1 = Split <axis: int = -1> (g, sizes)
    t = hecompile.Linear (e, w)
    x2 = Add (g0, t)
    y = Mul (x2, g1)
}
"""
PATHS = {"t": "model.layers.1.gate_proj", "d": "layers.0.o", "g": "layers.1.gate-up"}
MATRICES = {"layers.0.o": integers(2, 2, seed=1), "layers.1.gate-up": integers(4, 2, seed=2)}


def model(adapted: bool = True) -> ir.Model:
    made = parse(TEXT, PATHS)
    if adapted:
        run_pass(made, "attach_lora", CLIENT_PLAN, r=1, lora_alpha=1.0, target_modules=("gate_proj",))
    return made


def cut(products: bool) -> PrefixPlan:
    found = PASSES["cut_prefix"](products)(model())
    assert isinstance(found, PrefixPlan)
    return found


def asked(part: ir.Model) -> list[str]:
    return [module_path(node) for node in nodes_of_type(part, "RemoteLinear")]


def remote(linear: str, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x @ MATRICES[linear].t() * scale


def test_golden(golden: Golden) -> None:
    parts = cut(products=True)
    text = f"kept {parts.kept}\n--- prefix\n{print_model(parts.prefix)}--- rest\n{print_model(parts.rest)}"
    golden.check("cut_prefix", text)


@pytest.mark.parametrize(
    ("products", "kept", "prefix", "rest"),
    [(True, 6, ["layers.0.o", "layers.1.gate-up"], []), (False, 2, ["layers.0.o"], ["layers.1.gate-up"])],
)
def test_both_parts_together_are_the_plan(products: bool, kept: int, prefix: list[str], rest: list[str]) -> None:
    whole, parts = model(), cut(products)
    before = print_model(whole)
    assert parts.features == kept and (asked(parts.prefix), asked(parts.rest)) == (prefix, rest)
    for part in (parts.prefix, parts.rest):
        check_stage(part, CLIENT_PLAN)
    inputs = {"input_ids": torch.tensor([[0, 2, 1]])}
    adapter = {
        str(value.name): integers(*value.shape.numpy(), seed=3)
        for value in whole.graph.inputs
        if ".lora_" in str(value.name) and value.shape is not None
    }
    values = Interpreter(parts.prefix).run(inputs, Context(remote=remote))
    assert {name: value.shape[-1] for name, value in values.items()} == parts.kept
    result = evaluate(parts.rest, Context(remote=remote), **inputs, **adapter, **values)
    assert torch.equal(result, evaluate(whole, Context(remote=remote), **inputs, **adapter))
    assert print_model(whole) == before


def test_untouched_where_no_product_is_constant() -> None:
    """Adapters before the first product, or activations that a part of a model reads."""
    assert PASSES["cut_prefix"](False)(parse(TEXT.replace("e = Mul (x1, x1)", "e = Mul (x0, x0)"), PATHS)) is None
    part = """
part (float[B,S,2] x) => (float[B,S,2] y) <float[2] s = {1.0, 2.0}> {
    y = hecompile.RemoteLinear <linear: string = "a"> (x, s)
}
"""
    assert PASSES["cut_prefix"]()(parse(part)) is None
