"""Choosing bits per linear: text, the predicted error against the measured one, the order, and the budget."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
import torch

from hecompile.errors import InputError, LegalityError
from hecompile.graph.ir import WEIGHT_BITS, add_initializer, nodes_of_type, print_model
from hecompile.graph.legality import ADAPTED
from hecompile.graph.recorded import MOMENTS, Moments, squares
from hecompile.passes.offload.quantize import quantize_weight
from hecompile.passes.offload.select_weight_bits import SelectWeightBits, one_byte_error
from hecompile.plan.circuits import reachable_bits
from tests.support.graphs import gaussian, parse, refused, run_pass

TEXT = """
layer (float[B,S,24] x, float[32,24] wq, float[16,24] wk, float[8,32] wo, float[4,8] head)
  => (float[B,S,32] q, float[B,S,16] k, float[B,S,8] o, float[B,S,4] y)
{
    q = hecompile.Linear (x, wq)
    k = hecompile.Linear (x, wk)
    o = hecompile.Linear (q, wo)
    y = hecompile.Linear (o, head)
}
"""
ORIGINS = {"q": "m.layers.0.q_proj", "k": "m.layers.0.k_proj", "o": "m.layers.0.o_proj", "y": "lm_head"}


def layer(outlier: float = 1.0) -> ir.Model:
    """A calibrated layer; one column of o_proj is `outlier` times the others, and what it is multiplied with is small."""
    model = parse(TEXT, ORIGINS)
    x = gaussian(200, 24, seed=9)
    for seed, node in enumerate(nodes_of_type(model, "Linear")):
        weight = gaussian(*node.inputs[1].shape.numpy(), seed=seed)
        if node.inputs[1].name == "wo":
            weight[:, 3] *= outlier
        node.replace_input_with(1, add_initializer(model.graph, f"{node.inputs[1].name}.w", weight.numpy()))
        rows = gaussian(200, weight.shape[1], seed=10)
        if outlier != 1:
            rows[:, 3] /= outlier
        read, gradient = x if node.inputs[0].name == "x" else rows, 1e-20 * gaussian(200, len(weight), seed=11)
        node.outputs[0].meta[MOMENTS] = moments(read, weight, gradient)
        node.meta["rows"] = read, gradient
    return model


def moments(x: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor) -> Moments:
    outputs, products = squares(x @ weight.t()), squares(gradient.double() @ weight.double())
    return Moments(squares(x), float(outputs.sum()), squares(gradient), products)


def bits_of(model: ir.Model) -> dict[str, str]:
    return {str(n.outputs[0].name): n.metadata_props.get(WEIGHT_BITS, "") for n in nodes_of_type(model, "Linear")}


def test_the_prediction_is_the_error_that_rounding_makes() -> None:
    model = layer()
    for node in list(nodes_of_type(model, "Linear"))[:3]:
        weight, (x, gradient) = torch.from_numpy(node.inputs[1].const_value.numpy()), node.meta["rows"]
        gradient = 1e20 * gradient
        integers, scale = (torch.from_numpy(array) for array in quantize_weight(weight.numpy()))
        error = integers * scale[:, None] - weight
        pairs = ((x @ error.t(), x @ weight.t()), (gradient @ error, gradient @ weight))
        measured = sum(float((noise.norm() / signal.norm()) ** 2) for noise, signal in pairs)
        assert one_byte_error(node) == pytest.approx(measured, rel=0.1)


def test_those_with_the_largest_error_get_two_bytes_and_siblings_get_the_same() -> None:
    model = layer(outlier=50.0)
    before = print_model(model)
    first, second, third, _ = (one_byte_error(node) for node in nodes_of_type(model, "Linear"))
    assert third > 100 * (first + second)
    result = run_pass(model, "select_weight_bits", ADAPTED, error_budget=2 * (first + second))
    assert result.modified and bits_of(model) == {"q": "8", "k": "8", "o": "12", "y": ""}
    assert print_model(model) == before, "only metadata changes"
    assert not run_pass(model, "select_weight_bits", ADAPTED, error_budget=2 * (first + second)).modified
    run_pass(model, "select_weight_bits", ADAPTED, error_budget=first)
    assert bits_of(model) == {"q": "12", "k": "12", "o": "12", "y": ""}


@pytest.mark.parametrize("wanted", [8.0, 13.0, 15.0, 99.0])
def test_as_many_bits_as_the_precision_leaves_room_for(wanted: float) -> None:
    """Weights of more bits make the encryption's noise larger: what is chosen can be had, and one bit more could not."""
    model = layer()
    run_pass(model, "select_weight_bits", ADAPTED, error_budget=0.0, effective_bits=wanted)
    for linears in (("q", "k"), ("o",)):
        nodes = [node for node in nodes_of_type(model, "Linear") if node.outputs[0].name in linears]
        (bits,) = {int(node.metadata_props[WEIGHT_BITS]) for node in nodes}
        weight = np.concatenate([node.inputs[1].const_value.numpy() for node in nodes])
        reached = {each: reachable_bits(quantize_weight(weight, each)[0], 16.0, 16.0) for each in range(8, 13)}
        assert bits == max((each for each in reached if each > 8 and reached[each] >= wanted + 0.1), default=8)
    chosen = set(bits_of(model).values()) - {""}
    assert chosen == {"12"} if wanted == 8.0 else chosen == {"8"} if wanted == 99.0 else chosen


@pytest.mark.parametrize(("budget", "bits"), [(0.0, "12"), (1e9, "8")])
def test_the_ends_of_the_budget(budget: float, bits: str) -> None:
    model = layer()
    run_pass(model, "select_weight_bits", ADAPTED, error_budget=budget, include_head=True)
    assert set(bits_of(model).values()) == {bits}


@pytest.mark.parametrize("budget", [-1.0, float("nan")])
def test_a_budget_that_is_none_is_refused(budget: float) -> None:
    with pytest.raises(InputError, match="error_budget must be"):
        SelectWeightBits(budget)


def test_zeros_have_no_error_and_a_gradient_may_be_missing() -> None:
    model = layer()
    q, k, o, _ = nodes_of_type(model, "Linear")
    q.outputs[0].meta[MOMENTS] = dataclasses.replace(q.outputs[0].meta[MOMENTS], gradients=None, products=None)
    assert 0 < one_byte_error(q) < one_byte_error(k)
    o.outputs[0].meta[MOMENTS] = moments(torch.zeros(5, 32), torch.ones(8, 32), torch.zeros(5, 8))
    assert one_byte_error(o) == 0


def test_without_samples_it_is_refused_by_name() -> None:
    model = layer()
    next(nodes_of_type(model, "Linear")).outputs[0].meta.clear()
    error = refused(model, "select_weight_bits", ADAPTED)
    assert isinstance(error, LegalityError) and "m.layers.0.q_proj: calibrate with keep_samples" in str(error)
