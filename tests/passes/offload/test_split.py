"""Splitting: the client's text and the circuits, meaning with the circuits' products, and what is refused."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch

from hecompile.compiler.pipeline import PASSES
from hecompile.errors import LegalityError, SecurityError
from hecompile.graph.ir import PLACEMENT, SECRECY, print_model
from hecompile.graph.operators import Context
from hecompile.plan.circuits import SplitPlan
from tests.conftest import Golden
from tests.support.graphs import evaluate, integers, parse, prepared, product_of, run_pass, text_of

TEXT = """
model (float[B,S,3] x) => (float[B,S,2] y)
<int8[2,3] wu = {1, -2, 3, 4, 5, -128}, float[2] su = {0.5, 0.25}, int8[2,2] wd = {127, 0, 0, 1}, float[2] sd = {1.0, 2.0},
 float[B,S,2] up, float[B,S,2] sum>
{
    up = hecompile.QuantizedLinear (x, wu, su)
    sum = Add (up, up)
    y = hecompile.QuantizedLinear (sum, wd, sd)
}
"""
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


def placed() -> ir.Model:
    return prepared(parse(TEXT, {"up": UP, "y": DOWN}))


def selected() -> ir.Model:
    return run_pass(placed(), "select_parameters", effective_bits=6.0).model


def split(model: ir.Model) -> SplitPlan:
    return PASSES["split"]()(model)


def test_golden(golden: Golden) -> None:
    model, x = selected(), integers(2, 4, 3)
    before = evaluate(model, x=x)
    plan = split(model)
    golden.check("split", text_of(plan))
    assert torch.equal(evaluate(plan.client, Context(remote=product_of(plan)), x=x), before)


def test_the_weights_leave_the_client_and_only_they() -> None:
    plan = split(selected())
    assert set(plan.client.graph.initializers) == {"su", "sd"}


def test_untouched_without_worker_nodes() -> None:
    model = selected()
    for node in model.graph:
        node.metadata_props[PLACEMENT] = "client"
    before = print_model(model)
    plan = split(model)
    assert plan.circuits == ()
    assert print_model(plan.client) == before


def test_boundary_one_linear_stays_with_the_client() -> None:
    model, x = selected(), integers(2, 4, 3)
    model.graph.node(0).metadata_props[PLACEMENT] = "client"
    before = evaluate(model, x=x)
    plan = split(model)
    assert [circuit.name for circuit in plan.circuits] == [f"{DOWN}.forward", f"{DOWN}.backward"]
    assert set(plan.client.graph.initializers) == {"wu", "su", "sd"}
    assert torch.equal(evaluate(plan.client, Context(remote=product_of(plan)), x=x), before)


def test_refused_before_parameters_are_selected() -> None:
    with pytest.raises(LegalityError, match=f"{UP}: run quantize and select_parameters before split"):
        split(placed())


@pytest.mark.parametrize("secrecy", ["secret", None])
def test_refused_weight_that_is_not_known_to_be_public(secrecy: str | None) -> None:
    model = selected()
    metadata = model.graph.initializers["wu"].metadata_props
    del metadata[SECRECY]
    if secrecy is not None:
        metadata[SECRECY] = secrecy
    with pytest.raises(SecurityError, match=f"the weight of {UP} is secret and cannot be given to the worker"):
        split(model)


def test_a_remote_linear_without_a_worker_says_so() -> None:
    with pytest.raises(ValueError, match=f"RemoteLinear {UP}: this run has no worker"):
        evaluate(split(selected()).client, x=integers(1, 1, 3))
