"""Stacking linears that share an input: text, values and gradients, and what is not stacked."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch

from hecompile.errors import HecompileError
from hecompile.graph.interpreter import Interpreter
from hecompile.graph.ir import PLACEMENT, nodes_of_type, print_model
from hecompile.passes.offload import stack_projections
from hecompile.passes.offload.stack_projections import StackProjections, stacked_name
from tests.conftest import Golden
from tests.support.graphs import integers, parse, prepared, run_pass

TEXT = """
attention (float[B,S,2] x, float[B,S,2] z) => (float[B,S,3] q, float[B,S,1] k, float[B,S,2] o)
<int8[3,2] wq = {1, 2, 3, 4, 5, 6}, float[3] sq = {1.0, 0.5, 0.25}, int8[1,2] wk = {7, -8}, float[1] sk = {2.0},
 int8[2,2] wo = {1, 0, 0, 1}, float[2] so = {1.0, 1.0}>
{
    q = hecompile.QuantizedLinear (x, wq, sq)
    o = hecompile.QuantizedLinear (z, wo, so)
    k = hecompile.QuantizedLinear (x, wk, sk)
}
"""
Q_PATH, K_PATH, O_PATH = (f"model.layers.0.self_attn.{name}_proj" for name in "qko")


def attention() -> ir.Model:
    return prepared(parse(TEXT, {"q": Q_PATH, "k": K_PATH, "o": O_PATH}))


def outputs_and_gradients(model: ir.Model) -> dict[str, torch.Tensor]:
    x, z = integers(2, 3, 2).requires_grad_(), integers(2, 3, 2, seed=1).requires_grad_()
    outputs = Interpreter(model).run({"x": x, "z": z})
    torch.autograd.backward(list(outputs.values()), [integers(*y.shape, seed=i) for i, y in enumerate(outputs.values())])
    assert x.grad is not None and z.grad is not None
    return {**outputs, "dx": x.grad, "dz": z.grad}


def test_golden(golden: Golden) -> None:
    """Whole numbers and scales that are powers of two: values and gradients are equal exactly."""
    model = attention()
    before = outputs_and_gradients(model)
    result = run_pass(model, "stack_projections")
    assert result.modified
    golden.check("stack_projections", print_model(result.model))
    after = outputs_and_gradients(result.model)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def test_untouched_with_one_linear_on_the_worker_or_none() -> None:
    for client in ((0,), (2,), (0, 1, 2)):
        model = attention()
        for index in client:
            model.graph.node(index).metadata_props[PLACEMENT] = "client"
        before = print_model(model)
        result = run_pass(model, "stack_projections")
        assert not result.modified
        assert print_model(result.model) == before


def test_stacked_graph_is_left_alone() -> None:
    model = run_pass(attention(), "stack_projections").model
    before = print_model(model)
    assert not run_pass(model, "stack_projections").modified
    assert print_model(model) == before


def test_refused_graph_that_would_upload_a_value_twice() -> None:
    with pytest.raises(ir.passes.PostconditionError, match=f"{K_PATH} would upload its input a second time"):
        StackProjections().ensures(attention())


def test_refused_name_that_two_groups_share() -> None:
    """Two modules of one path cannot be told apart by the worker."""
    text = TEXT.replace("(z, wo, so)", "(z, wo, so)\n    p = hecompile.QuantizedLinear (z, wk, sk)").replace(
        "float[B,S,2] o)", "float[B,S,2] o, float[B,S,1] p)"
    )
    model = prepared(parse(text, {"q": Q_PATH, "k": K_PATH, "o": Q_PATH, "p": K_PATH}))
    with pytest.raises(HecompileError, match=f"{Q_PATH}-k_proj: two stacked linears have this name"):
        run_pass(model, "stack_projections")


def test_boundary_names_of_other_parents_keep_their_paths() -> None:
    assert stacked_name(["a.b.q_proj", "a.b.k_proj"]) == "a.b.q_proj-k_proj"
    assert stacked_name(["a.b.q_proj", "a.c.k_proj"]) == "a.b.q_proj-a.c.k_proj"
    assert stacked_name([f"a.e.{number}.up" for number in range(9, 12)]) == "a.e.9-11.up"
    assert stacked_name(["a.e.1.up", "a.e.3.up"]) == "a.e.1.up-a.e.3.up"
    assert stacked_name(["a.e.1.up", "a.e.2.down"]) == "a.e.1.up-a.e.2.down"
    assert stacked_name(["lm_head", "other"]) == "lm_head-other"


@pytest.mark.parametrize(("most", "outputs"), [(3, [3, 2, 1]), (4, [4, 2])])
def test_no_product_has_more_inputs_than_can_be_checked(
    monkeypatch: pytest.MonkeyPatch, most: int, outputs: list[int]
) -> None:
    """q has 3 outputs and k 1; o reads another value."""
    monkeypatch.setattr(stack_projections, "MOST_OUTPUTS", most)
    model = run_pass(attention(), "stack_projections").model
    assert [int(node.inputs[1].shape.numpy()[0]) for node in nodes_of_type(model, "QuantizedLinear")] == outputs
