"""A run a block at a time sees the values and gradients that a run of the whole graph sees."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from hecompile.compiler.pipeline import approximate
from hecompile.graph.interpreter import Interpreter, graph_inputs
from hecompile.graph.ir import nodes_of_type
from hecompile.graph.streaming import StreamedRun, segments
from tests.support.tiny import exported, samples


@pytest.fixture(scope="module")
def model() -> ir.Model:
    return approximate(exported())


def test_segments_are_blocks_and_the_head_is_the_last(model: ir.Model) -> None:
    found = segments(model)
    linears = [[node for node in part.nodes if node.op_type == "Linear"] for part in found]
    assert [len(nodes) for nodes in linears] == [0, 7, 7, 0, 1]
    assert len(found[-1].reads) == 1, "logits are made a sequence at a time"


def test_values_and_gradients_are_those_of_a_whole_run(model: ir.Model) -> None:
    tokens = torch.tensor(samples())
    inputs = graph_inputs(tokens, torch.ones_like(tokens), model)
    values: dict[ir.Value, Tensor] = {}

    def observe(value: ir.Value, result: Tensor) -> None:
        if not result.requires_grad and value in read:
            result.requires_grad_()
        if result.requires_grad:
            result.retain_grad()
        values[value] = result

    read = {node.inputs[0] for node in nodes_of_type(model, "Linear")}
    (logits,) = Interpreter(model).run(inputs, observer=observe).values()
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()

    seen: dict[ir.Value, list[Tensor]] = {}
    gradients: dict[ir.Node, list[tuple[Tensor, Tensor]]] = {}

    def loss(logits: Tensor, rows: slice) -> Tensor:
        total = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[rows, 1:].flatten(), reduction="sum")
        return total / tokens[:, 1:].numel()

    StreamedRun(
        model, inputs,
        lambda value, result: seen.setdefault(value, []).append(result),
        lambda node, gradient, product, _: gradients.setdefault(node, []).append((gradient, product)),
    ).run(len(tokens), loss)  # fmt: skip
    for value, result in values.items():
        torch.testing.assert_close(torch.cat(seen[value]) if len(seen[value]) > 1 else seen[value][0], result.detach())
    assert len(gradients) == 15
    for node, parts in gradients.items():
        gradient, product = (torch.cat(each) for each in zip(*parts, strict=True))
        wanted = values[node.outputs[0]].grad
        assert wanted is not None
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-9)
        weight = torch.from_numpy(node.inputs[1].const_value.numpy())
        torch.testing.assert_close(product, wanted @ weight, rtol=1e-5, atol=1e-8)
