"""Rotating the inputs of frozen linears: text, values and gradients, what is left alone, and what outliers become."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch

from hecompile.graph.interpreter import Interpreter
from hecompile.graph.ir import DOMAIN, ORIGIN, constant_of, nodes_of_type, print_model
from hecompile.graph.legality import ADAPTED
from hecompile.graph.rotation import rotate
from tests.conftest import Golden
from tests.support.graphs import gaussian, parse, refused, run_pass
from tests.support.tiny import coarse

TEXT = """
attention (float[B,S,6] x) => (float[B,S,2] q, float[B,S,2] k, float[B,S,2] y)
<float[2,6] wq = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.0, 0.0, 0.0, 0.0, 0.0, 9.0},
 float[2,6] wk = {1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 2.0, 0.0, 2.0, 0.0, 2.0},
 float[2,2] head = {1.0, 2.0, 3.0, 4.0}, float[1,6] a = {1.0, 1.0, 1.0, 1.0, 1.0, 1.0}, float[2,1] b = {1.0, 2.0}>
{
    frozen = hecompile.Linear (x, wq)
    branch = hecompile.Lora <scaling = 2.0, dropout = 0.0> (x, a, b)
    q = Add (frozen, branch)
    k = hecompile.Linear (x, wk)
    y = hecompile.Linear (q, head)
}
"""
ORIGINS = {
    "frozen": "model.layers.0.self_attn.q_proj",
    "branch": "model.layers.0.self_attn.q_proj",
    "k": "model.layers.0.self_attn.k_proj",
    "y": "lm_head",
}


def attention() -> ir.Model:
    return parse(TEXT, ORIGINS)


def outputs_and_gradient(model: ir.Model) -> dict[str, torch.Tensor]:
    x = gaussian(2, 3, 6).requires_grad_()
    outputs = Interpreter(model).run({"x": x})
    torch.autograd.backward(list(outputs.values()), [gaussian(*y.shape, seed=i) for i, y in enumerate(outputs.values())])
    assert x.grad is not None
    return {**outputs, "dx": x.grad}


def test_golden(golden: Golden) -> None:
    """q and k share a rotation, LoRA and the head read what they read before; values and gradients differ by rounding."""
    model = attention()
    before = outputs_and_gradient(model)
    result = run_pass(model, "rotate", ADAPTED)
    assert result.modified
    golden.check("rotate", coarse(print_model(result.model)))
    after = outputs_and_gradient(result.model)
    assert after.keys() == before.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-5 * float(value.detach().abs().max()), msg=name)


def test_the_head_too_where_it_is_asked_for() -> None:
    model = attention()
    run_pass(model, "rotate", ADAPTED, include_head=True)
    assert [str(node.inputs[0].name) for node in nodes_of_type(model, "Rotate")] == ["x.balanced", "q.balanced"]


def test_untouched_outside_the_decoder_layers() -> None:
    model = parse(TEXT, dict.fromkeys(ORIGINS, "model.projector"))
    before = print_model(model)
    assert not run_pass(model, "rotate", ADAPTED).modified
    assert print_model(model) == before


def test_a_rotated_value_that_something_else_reads_is_refused() -> None:
    model = attention()
    spy = ir.node("Rotate", [model.graph.inputs[0]], domain=DOMAIN, metadata_props={ORIGIN: "model.layers.0.self_attn"})
    total = ir.node("Neg", [spy.outputs[0]])
    model.graph.extend([spy, total])
    model.graph.outputs.append(total.outputs[0])
    assert "is read by more than linears" in str(refused(model, "rotate", ADAPTED))


@pytest.mark.parametrize("size", [1, 2, 3, 6, 7, 64, 128, 576, 1536, 2048, 14336])
def test_the_matrix_is_orthogonal_and_even(size: int) -> None:
    """Every entry of it is at most sqrt(2 / n): one outlier is spread over all columns."""
    rows = torch.eye(size)[:: max(1, size // 64)]
    rotated = rotate(rows)
    torch.testing.assert_close(rotated @ rotated.t(), torch.eye(len(rows)), rtol=0, atol=1e-5)
    assert float(rotated.abs().max()) < 1.4143 * size**-0.5 * (1 + 1e-5)


@pytest.mark.parametrize("size", [64, 576, 1536, 2048])
def test_a_constant_becomes_even_too(size: int) -> None:
    rotated = rotate(torch.ones(1, size))
    assert float(rotated.abs().max()) < 2.2


def test_rows_are_rotated_one_by_one_and_gradients_back() -> None:
    x = gaussian(2, 5, 24).double().requires_grad_()
    matrix = rotate(torch.eye(24, dtype=torch.float64))  # Rᵀ
    torch.testing.assert_close(rotate(x), x @ matrix)
    gradient = gaussian(2, 5, 24, seed=1).double()
    rotate(x).backward(gradient)
    torch.testing.assert_close(x.grad, gradient @ matrix.t())


def test_columns_are_balanced_by_what_all_readers_have_and_zeros_and_infinities_stay() -> None:
    """Columns of wq and wk have norms √2, √8, √10, √20, √26 and √121 of mean 4.65; those within a factor of 2 stay."""
    model = attention()
    run_pass(model, "rotate", ADAPTED)
    scale = constant_of(model.graph.initializers["model.layers.0.self_attn.q_proj.column_scale"])
    norms = torch.tensor([2.0, 8.0, 10.0, 20.0, 26.0, 121.0]).sqrt()
    expected = torch.ones(6)
    expected[0], expected[5] = 2 * norms[0] / norms.mean(), norms[5] / norms.mean() / 2
    torch.testing.assert_close(torch.tensor(scale), expected)
    for damage in (0.0, float("inf"), float("nan")):
        model = attention()
        for name in ("wq", "wk"):
            weight = torch.tensor(constant_of(model.graph.initializers[name]))
            weight[:, 2] = damage
            model.graph.initializers[name].const_value = ir.Tensor(weight.numpy(), name=name)
        run_pass(model, "rotate", ADAPTED)
        scale = torch.tensor(constant_of(model.graph.initializers["model.layers.0.self_attn.q_proj.column_scale"]))
        assert bool((scale > 0).all()) and bool(torch.isfinite(scale).all()) and float(scale[2]) == 1.0


def test_outliers_of_a_weight_no_longer_set_the_scale() -> None:
    weight = gaussian(4, 576)
    weight[:, 17] = 300.0
    assert float(rotate(weight).abs().max()) < 300 * 1.4143 / 24 + 5
