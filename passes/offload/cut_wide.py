"""Cut a linear on the worker that has more outputs than a product can take, as output heads have, into parts.

    y = QuantizedLinear(x, W, s)  →  y = Concat(QuantizedLinear(x, W[0:n], s[0:n]), QuantizedLinear(x, W[n:2n], s[n:2n]), …)

Exact. A part is a linear of its own, named `lm_head.part0`, with an upload of its own: one more of the hidden size for each
part, little beside the part's outputs. Backward each part's gradient is encoded by itself, so that the parts that no target
is in, whose gradients are small, keep their precision. The gradient of x is the sum of the parts'.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from hecompile.graph.ir import (
    DOMAIN,
    ORIGIN,
    PLACEMENT,
    SECRECY,
    add_initializer,
    constant_of,
    module_path,
    nodes_of_type,
    remove_unused,
    replace_node,
)
from hecompile.plan.circuits import MOST_OUTPUTS, PART, parts_of


@dataclass(frozen=True)
class CutWide(ir.passes.InPlacePass):
    """Cut every QuantizedLinear on the worker of more than MOST_OUTPUTS outputs into parts of about one size."""

    most: int = MOST_OUTPUTS
    part: int = PART

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in nodes_of_type(model, "QuantizedLinear"):
            if not self._too_wide(node):
                continue
            weight = constant_of(node.inputs[1])
            if weight is not None:
                _cut(model.graph, node, weight, parts_of(len(weight), self.most, self.part))
                modified = True
        if modified:
            remove_unused(model)
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        for node in nodes_of_type(model, "QuantizedLinear"):
            if self._too_wide(node):
                raise ir.passes.PostconditionError(f"{module_path(node)} has more outputs than a product can take")

    def _too_wide(self, node: ir.Node) -> bool:
        weight = node.inputs[1]
        remote = node.metadata_props.get(PLACEMENT) == "worker"
        return remote and weight is not None and weight.shape is not None and int(weight.shape.numpy()[0]) > self.most


def _cut(graph: ir.Graph, node: ir.Node, weight: np.ndarray, cuts: list[slice]) -> None:
    name, scale, output = module_path(node), constant_of(node.inputs[2]), node.outputs[0]
    assert scale is not None
    parts = []
    for index, rows in enumerate(cuts):
        path = f"{name}.part{index}"
        part = ir.node(
            "QuantizedLinear",
            [
                node.inputs[0],
                _public(graph, f"{path}.weight_{weight.dtype}", weight[rows]),  # a view: no copy
                _public(graph, f"{path}.weight_scale", scale[rows]),
            ],
            domain=DOMAIN,
            metadata_props={ORIGIN: path, PLACEMENT: "worker"},
        )
        value = part.outputs[0]
        value.name, value.type = f"{path}.out", output.type
        if output.shape is not None:
            value.shape = ir.Shape([*output.shape[:-1], len(scale[rows])])
        value.metadata_props[SECRECY] = output.metadata_props.get(SECRECY, "secret")
        parts.append(part)
    joined = ir.node(
        "Concat",
        [part.outputs[0] for part in parts],
        {"axis": -1},
        metadata_props={ORIGIN: name, PLACEMENT: "client"},
    )
    replace_node(node, [*parts, joined], joined.outputs)


def _public(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    value = add_initializer(graph, name, array)
    value.metadata_props[SECRECY] = "public"
    return value
