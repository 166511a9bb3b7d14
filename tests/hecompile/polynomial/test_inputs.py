"""Record what goes into the attentions, norms and activations of a run, packed or not, with gradients or without."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from hecompile.graph.interpreter import Interpreter, causal_attention_bias
from hecompile.graph.operators import Context
from hecompile.polynomial.domains import DomainMonitor
from hecompile.polynomial.inputs import AttentionInputs, NonlinearNodes, is_approximated
from tests.support.graphs import gaussian

TEXT = """
<ir_version: 10, opset_import: ["" : 23, "hecompile" : 1]>
block (float[B,H,S,D] q, float[B,H,S,D] k, float[B,H,S,D] v, float[B,1,S,S] bias) => (float[B,H,S,D] y)
<float[4] gain = {1, 1, 1, 1}>
{
    attended = hecompile.GaussianAttention <scale = 0.5, squarings = 4, domain_lower = -16.0, domain_upper = 0.0,
        error_bound = 0.1> (q, k, v, bias)
    normed = hecompile.RMSNorm <epsilon = 0.25> (attended, gain)
    y = hecompile.PolynomialSiLU <coefficients = [0.0, 0.5], domain_lower = -1.0, domain_upper = 1.0,
        error_bound = 0.1> (normed)
}
"""
LENGTHS = (3, 2)


def graph() -> ir.Model:
    return ir.from_onnx_text(TEXT)


def data() -> dict[str, Tensor]:
    inputs = {name: gaussian(1, 2, sum(LENGTHS), 4, seed=seed) for seed, name in enumerate("qkv")}
    return inputs | {"bias": causal_attention_bias(torch.ones(1, sum(LENGTHS), dtype=torch.int64))}


def received(
    inputs: dict[str, Tensor], lengths: Sequence[int] | None = None, gradients: bool = False
) -> tuple[list[tuple[str, AttentionInputs | Tensor]], dict[str, Tensor]]:
    """Return what a recorder received, by operator, and every value of the run."""
    model, values, taken = graph(), {}, []
    recorder = NonlinearNodes(model).record(lambda node, x: taken.append((node.op_type, x)), inputs, lengths, gradients)

    def observe(value: ir.Value, result: Tensor) -> None:
        values[str(value.name)] = result
        recorder.observe(value, result)

    Interpreter(model).run(inputs, Context(sequences=None if lengths is None else tuple(lengths)), observe)
    return taken, values


def test_every_node_is_received_in_order_with_its_inputs() -> None:
    inputs = data()
    taken, values = received(inputs)
    assert [op_type for op_type, _ in taken] == ["GaussianAttention", "RMSNorm", "PolynomialSiLU"]
    attention, variances, x = (one for _, one in taken)
    assert isinstance(attention, AttentionInputs) and attention.share == 1.0
    distances = (inputs["q"][:, :, :, None] - inputs["k"][:, :, None]).pow(2).sum(-1)
    assert torch.allclose(attention.exponents, -0.25 * distances, atol=1e-5)
    assert attention.visible(attention.scores).numel() == 2 * 15
    assert torch.equal(variances, values["attended"].pow(2).mean(-1) + 0.25)  # type: ignore[arg-type]
    assert torch.equal(x, values["normed"])  # type: ignore[arg-type]


def test_packed_sequences_are_received_one_by_one() -> None:
    inputs = data()
    attentions = [one for _, one in received(inputs, LENGTHS)[0] if isinstance(one, AttentionInputs)]
    assert [one.share for one in attentions] == [3 / 5, 2 / 5]
    for one, start in zip(attentions, (0, 3), strict=True):
        length = one.q.shape[2]
        assert torch.equal(one.q, inputs["q"][:, :, start : start + length])
        assert torch.equal(one.mask[0, 0], torch.ones(length, length).tril())


@pytest.mark.parametrize("gradients", [False, True])
def test_gradients_are_handed_on_where_they_are_asked_for(gradients: bool) -> None:
    inputs = data()
    inputs["q"].requires_grad_()
    taken, _ = received(inputs, LENGTHS, gradients)
    attention, *others = (one for _, one in taken)
    assert isinstance(attention, AttentionInputs)
    tensors = [attention.q, *(one for one in others if isinstance(one, Tensor))]
    assert all(tensor.requires_grad == gradients for tensor in tensors)


def test_the_selected_nodes_alone() -> None:
    nodes = NonlinearNodes(graph(), is_approximated)
    assert nodes and len(nodes.attentions) == len(nodes.others) == 1
    assert not NonlinearNodes(graph(), lambda node: False)


def test_violations_end_at_the_first_node_that_is_not_finite() -> None:
    def violations(factor: float) -> list[str]:
        model, inputs = graph(), data()
        inputs["q"] = inputs["q"] * factor
        monitor = DomainMonitor(model, LENGTHS)
        # q and k are graph inputs, which the interpreter does not show.
        for value in model.graph.inputs:
            monitor.observe(value, inputs[str(value.name)])
        Interpreter(model).run(inputs, Context(sequences=LENGTHS), monitor.observe)
        return [one.what for one in monitor.violations]

    assert violations(1.0)[-1:] == ["the input"]
    assert violations(math.inf) == ["the exponent"]
