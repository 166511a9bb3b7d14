"""Cutting a head into parts: text, values and gradients, and what is not cut."""

from __future__ import annotations

import onnx_ir as ir
import torch

from hecompile.graph.interpreter import Interpreter
from hecompile.graph.ir import PLACEMENT, print_model
from tests.conftest import Golden
from tests.support.graphs import integers, parse, prepared, refused, run_pass

TEXT = """
head (float[B,S,2] x) => (float[B,S,5] y)
<int8[5,2] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, float[5] s = {1.0, 0.5, 0.25, 2.0, 4.0}>
{
    y = hecompile.QuantizedLinear (x, w, s)
}
"""


def head() -> ir.Model:
    return prepared(parse(TEXT, {"y": "lm_head"}))


def value_and_gradient(model: ir.Model) -> tuple[torch.Tensor, torch.Tensor]:
    x = integers(2, 3, 2).requires_grad_()
    (y,) = Interpreter(model).run({"x": x}).values()
    y.backward(integers(2, 3, 5, seed=1))
    assert x.grad is not None
    return y.detach(), x.grad


def test_golden(golden: Golden) -> None:
    """Whole numbers and scales that are powers of two: values and gradients are equal exactly."""
    model = head()
    before = value_and_gradient(model)
    result = run_pass(model, "cut_wide", most=4, part=2)
    assert result.modified
    golden.check("cut_wide", print_model(result.model))
    for own, expected in zip(value_and_gradient(result.model), before, strict=True):
        assert torch.equal(own, expected)


def test_untouched_at_the_limit_and_on_the_client() -> None:
    for most, place in ((5, "worker"), (4, "client")):
        model = head()
        model.graph.node(0).metadata_props[PLACEMENT] = place
        before = print_model(model)
        assert not run_pass(model, "cut_wide", most=most, part=2).modified
        assert print_model(model) == before


def test_parts_that_are_still_too_wide_are_refused() -> None:
    assert "has more outputs than a product can take" in str(refused(head(), "cut_wide", most=2, part=3))
