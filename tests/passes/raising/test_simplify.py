"""Removing what the exporter adds: its text, its meaning, what is left alone and what is refused."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch

from hecompile.errors import LegalityError
from hecompile.graph.interpreter import Interpreter, graph_inputs
from hecompile.graph.ir import print_model
from hecompile.graph.legality import EXPORTED
from tests.conftest import Golden
from tests.support.graphs import evaluate, gaussian, parse, refused, run_pass
from tests.support.tiny import exported

NOISY = """
noisy (float[batch,sequence,8] x) => (float[batch,sequence,8] y)
<int64[1] zero = {0}, int64[1] end = {9223372036854775807}, int64[1] axis = {2}, int64[1] step = {1},
 float one = {1.0}, int64[1] two = {2}, int64[1] four = {4}, int64[1] eight = {8},
 float[batch,sequence,8] whole, float[batch,sequence,4,2] heads>
{
    whole = Slice (x, zero, end, axis, step)
    scaled = Mul (one, whole)
    same = Identity (scaled)
    batch = Shape <start: int = 0, end: int = 1> (x)
    sequence = Shape <start: int = 1, end: int = 2> (x)
    shape = Concat <axis: int = 0> (batch, sequence, four, two)
    heads = Reshape <allowzero: int = 1> (same, shape)
    cast = Cast <to: int = 1> (heads)
    again = Neg (cast)
    once_more = Neg (heads)
    sum = Add (again, once_more)
    back = Concat <axis: int = 0> (batch, sequence, eight)
    y = Reshape <allowzero: int = 1> (sum, back)
}
"""


def noisy() -> ir.Model:
    return parse(NOISY, {"heads": "model.layers.0.self_attn"})


def test_golden(golden: Golden) -> None:
    model, x = noisy(), gaussian(2, 3, 8)
    before = evaluate(model, x=x)
    result = run_pass(model, "simplify", EXPORTED)
    assert result.modified
    golden.check("simplify", print_model(result.model))
    assert torch.equal(evaluate(result.model, x=x), before)


def test_the_export_keeps_its_meaning_exactly_and_is_simple_after_one_run() -> None:
    model = exported()
    tokens = torch.arange(10).reshape(2, 5)
    inputs = graph_inputs(tokens, torch.ones_like(tokens))
    before = Interpreter(model).run(inputs)["logits"]
    assert run_pass(model, "simplify", EXPORTED).modified
    assert torch.equal(Interpreter(model).run(inputs)["logits"], before)
    text = print_model(model)
    result = run_pass(model, "simplify", EXPORTED)
    assert not result.modified and print_model(result.model) == text


UNTOUCHED = {
    "a slice that starts later": ("Slice (x, one, end, axis, step)", "int64[1] one = {1}", "9223372036854775807"),
    "a slice that ends": ("Slice (x, zero, end, axis, step)", "int64[1] zero = {0}", "9223372036854775806"),
    "a multiplication by a vector": ("Mul (x, ones)", "float[1] ones = {1.0}", None),
    "a multiplication by nearly one": ("Mul (x, nearly)", "float nearly = {1.0000001}", None),
    "a cast that converts": ("Cast <to: int = 11> (x)", None, None),
    "a no-op that is the result": ("Identity (x)", None, None),
}


@pytest.mark.parametrize(("operation", "constant", "end"), UNTOUCHED.values(), ids=UNTOUCHED)
def test_untouched(operation: str, constant: str | None, end: str | None) -> None:
    slicing = f", int64[1] end = {{{end}}}, int64[1] axis = {{1}}, int64[1] step = {{1}}" if end else ""
    constants = f"<{constant}{slicing}>" if constant else ""
    model = parse(f"g (float[B,4] x) => (float[B,N] y) {constants} {{ y = {operation} }}")
    before = print_model(model)
    result = run_pass(model, "simplify", EXPORTED)
    assert not result.modified
    assert print_model(result.model) == before


def reshape(before: list[str | int | None], after: list[str | int | None]) -> ir.Model:
    model = parse(
        "g (float[A,B,6] x, int64[n] shape) => (float[C,D,E] y) { whole = Neg (x)\n y = Reshape (whole, shape) }"
    )
    model.graph.node(0).outputs[0].shape = ir.Shape(before)
    model.graph.outputs[0].shape = ir.Shape(after)
    return model


def test_boundary_one_unknown_dimension_is_inferred() -> None:
    model, x = reshape(["A", "B", 6], ["A", "B*2", 3]), gaussian(2, 4, 6)
    before = evaluate(model, x=x, shape=torch.tensor([2, 8, 3]))
    assert run_pass(model, "simplify", EXPORTED).modified
    assert "%y_shape: i64[3] = Constant() {value=[0, -1, 3]}" in print_model(model)
    assert torch.equal(evaluate(model, x=x, shape=torch.tensor([2, 8, 3])), before)


@pytest.mark.parametrize(
    ("before", "after"),
    [(["A", "B", 6], ["B", "A", 6]), ([None, None, 6], [None, None, 3]), (["A", "B", 6], ["A*B", "N", 3])],
    ids=["exchanged", "unnamed", "two unknown"],
)
def test_a_shape_that_cannot_be_proved_is_left(before: list[str | int | None], after: list[str | int | None]) -> None:
    model = reshape(before, after)
    text = print_model(model)
    result = run_pass(model, "simplify", EXPORTED)
    assert not result.modified
    assert print_model(result.model) == text


def test_refused_operator_is_named_with_its_module() -> None:
    model = parse("g (float[B,4] x) => (float[B,4] y) { y = Ceil (x) }", {"y": "model.layers.3.mlp.act_fn"})
    error = refused(model, "simplify", EXPORTED)
    assert isinstance(error, LegalityError)
    assert str(error) == (
        "stage 'exported', model.layers.3.mlp.act_fn: %y = Ceil(%x:[B,4]): operator onnx::Ceil is not legal here"
    )
