"""Give each expert of a mixture the tokens alone that its router chose for it.

    y_e = Mul(Expert_e(x), w_e)   →   y_e = Mul(PutRows(Expert_e(TakeRows(x, w_e)), w_e), w_e)

x is [B, S, H] and w_e [B, S, 1], the weight of expert e (Shazeer et al., arXiv 1701.06538), 0 for tokens that do not go
there. An expert works row by row, so that rows which are multiplied by 0 need not be computed: exact. Its linears are asked
for n rows, or not at all where n is 0. The worker thereby learns how many tokens go to which expert; without this pass every
expert is asked for every token, and it learns nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from hecompile.graph.ir import DOMAIN, ORIGIN, PLACEMENT, SECRECY, module_path, nodes_of_type
from hecompile.graph.matching import either_order

_EXPERT = re.compile(r"(.+\.experts\.\d+)(\..+)?")


@dataclass(frozen=True)
class _Expert:
    """Hold an expert's nodes in graph order, what they read, its result, and the weight that the result is multiplied by.

    read: x, and x rotated where a frozen linear wants it so.
    """

    path: str
    nodes: tuple[ir.Node, ...]
    read: tuple[ir.Value, ...]
    result: ir.Value
    product: ir.Node
    weight: ir.Value


@dataclass(frozen=True)
class RouteExperts(ir.passes.InPlacePass):
    """Let experts work on the rows that were chosen for them. A graph without experts is left as it is."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        experts = list(_experts(model))
        for expert in experts:
            _route(model.graph, expert)
        return ir.passes.PassResult(model, bool(experts))


def has_experts(model: ir.Model) -> bool:
    """Tell whether the graph has experts."""
    return next(_experts(model), None) is not None


def _experts(model: ir.Model) -> Iterator[_Expert]:
    groups: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        if (match := _EXPERT.fullmatch(module_path(node))) is not None:
            group = groups.setdefault(match[1], [])
            # x is rotated once for all experts, by nodes that are named after the first of them.
            if not _rotates(node) or (node.inputs[0] is not None and node.inputs[0].producer() in group):
                group.append(node)
    for product in list(nodes_of_type(model, "Mul", domain="")):
        for result, weight in either_order(product):
            maker = result.producer()
            match = None if maker is None else _EXPERT.fullmatch(module_path(maker))
            if match is None or product in groups[match[1]] or weight.shape is None or weight.shape[-1] != 1:
                continue
            nodes = groups[match[1]]
            values = (value for node in nodes for value in node.inputs if value is not None)
            read = tuple(dict.fromkeys(value for value in values if _from_outside(value, nodes)))
            if len({_before_rotation(value) for value in read}) == 1 and len(result.uses()) == 1:
                yield _Expert(match[1], tuple(nodes), read, result, product, weight)


def _rotates(node: ir.Node) -> bool:
    """Tell whether a node rotates, or scales what is rotated then (`passes/offload/rotate.py`)."""
    users = node.outputs[0].consumers()
    return node.op_type == "Rotate" or (node.op_type == "Mul" and any(user.op_type == "Rotate" for user in users))


def _before_rotation(value: ir.Value | None) -> ir.Value | None:
    maker = None if value is None else value.producer()
    return _before_rotation(maker.inputs[0]) if maker is not None and _rotates(maker) else value


def _from_outside(value: ir.Value, nodes: list[ir.Node]) -> bool:
    maker = value.producer()
    return maker is not None and maker not in nodes and maker.op_type != "Constant"


def _route(graph: ir.Graph, expert: _Expert) -> None:
    taken = {
        value: _node("TakeRows", value, expert, f"{expert.path}.taken" + number * ".rotated")
        for number, value in enumerate(expert.read)
    }
    graph.insert_before(expert.nodes[0], list(taken.values()))
    for node in expert.nodes:
        for index, value in enumerate(node.inputs):
            if value in taken:
                node.replace_input_with(index, taken[value].outputs[0])
        for output in node.outputs:
            if output.shape is not None and len(output.shape) == 3:
                output.shape = ir.Shape([1, None, output.shape[-1]])
    put = _node("PutRows", expert.result, expert, f"{expert.path}.put")
    put.outputs[0].shape = ir.Shape([*expert.weight.shape[:-1], expert.result.shape[-1]])  # type: ignore[index]
    graph.insert_before(expert.product, [put])
    index = list(expert.product.inputs).index(expert.result)
    expert.product.replace_input_with(index, put.outputs[0])


def _node(op_type: str, x: ir.Value, expert: _Expert, name: str) -> ir.Node:
    node = ir.node(
        op_type, [x, expert.weight], domain=DOMAIN, metadata_props={ORIGIN: expert.path, PLACEMENT: "client"}
    )
    output = node.outputs[0]
    output.name, output.type = name, x.type
    output.shape = None if x.shape is None else ir.Shape([1, None, x.shape[-1]])
    output.metadata_props[SECRECY] = "secret"
    return node
