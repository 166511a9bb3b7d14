"""Giving experts the rows chosen for them: text, meaning, rows that are asked, and what is left alone."""

from __future__ import annotations

import onnx_ir as ir
import torch

from hecompile.graph.interpreter import Interpreter
from hecompile.graph.ir import print_model
from hecompile.graph.legality import QUANTIZED
from tests.conftest import Golden
from tests.support.graphs import evaluate, integers, parse, run_pass

TEXT = """
block (float[B,S,2] x, float[B,S,1] w0, float[B,S,1] w1) => (float[B,S,2] y)
<int8[3,2] up0 = {1, 2, 3, 4, 5, 6}, int8[2,3] down0 = {1, 0, 0, 1, 1, 1}, int8[2,2] one1 = {1, 1, -1, 2},
 float[3] three = {1.0, 2.0, 1.0}, float[2] two = {1.0, 0.5}, float[B,S,2] h, float[B,S,3] a, float[B,S,3] b,
 float[B,S,2] r0, float[B,S,2] r1, float[B,S,1] v0, float[B,S,1] v1>
{
    h = Neg (x)
    v0 = Neg (w0)
    v1 = Neg (w1)
    a = hecompile.QuantizedLinear (h, up0, three)
    b = hecompile.SiLU (a)
    r0 = hecompile.QuantizedLinear (b, down0, two)
    y0 = Mul (r0, v0)
    r1 = hecompile.QuantizedLinear (h, one1, two)
    y1 = Mul (v1, r1)
    y = Add (y0, y1)
}
"""
PATH = "model.layers.0.mlp"
FIRST, SECOND = f"{PATH}.experts.0", f"{PATH}.experts.1"
ORIGINS = {"a": f"{FIRST}.up", "b": FIRST, "r0": f"{FIRST}.down", "r1": f"{SECOND}.up"}


def inputs() -> dict[str, torch.Tensor]:
    """Expert 0 gets the first token of each row, expert 1 the second and third of the first row."""
    w0 = torch.zeros(2, 3, 1)
    w0[:, 0], w1 = 0.5, torch.zeros(2, 3, 1)
    w1[0, 1:] = 2.0
    return {"x": integers(2, 3, 2), "w0": w0, "w1": w1}


def rows_at(model: ir.Model, given: dict[str, torch.Tensor]) -> dict[str, int]:
    seen: dict[str, int] = {}
    Interpreter(model).run(given, observer=lambda value, result: seen.update({str(value.name): result[..., 0].numel()}))
    return {name: seen[name] for name in ("a", "r0", "r1")}


def test_golden(golden: Golden) -> None:
    model, given = parse(TEXT, ORIGINS), inputs()
    before = evaluate(model, **given)
    assert rows_at(model, given) == {"a": 6, "r0": 6, "r1": 6}
    result = run_pass(model, "route_experts", QUANTIZED)
    assert result.modified
    golden.check("route_experts", print_model(result.model))
    assert torch.equal(evaluate(model, **given), before)
    assert rows_at(model, given) == {"a": 2, "r0": 2, "r1": 2}


def test_gradients_stay_what_they_were() -> None:
    grads = []
    for routed in (False, True):
        model = parse(TEXT, ORIGINS)
        if routed:
            run_pass(model, "route_experts", QUANTIZED)
        given = {name: value.requires_grad_() for name, value in inputs().items()}
        evaluate(model, **given).pow(2).sum().backward()
        grads.append(given["x"].grad)
    assert grads[0] is not None and torch.equal(grads[0], grads[1])


def test_boundary_an_expert_without_tokens_has_no_rows() -> None:
    model, given = parse(TEXT, ORIGINS), inputs()
    before = evaluate(model, **{**given, "w1": torch.zeros(2, 3, 1)})
    run_pass(model, "route_experts", QUANTIZED)
    given["w1"] = torch.zeros(2, 3, 1)
    assert torch.equal(evaluate(model, **given), before) and rows_at(model, given)["r1"] == 0


def test_untouched_are_linears_of_no_expert() -> None:
    model = parse(TEXT, dict.fromkeys(ORIGINS, PATH))
    before = print_model(model)
    assert not run_pass(model, "route_experts", QUANTIZED).modified
    assert print_model(model) == before
