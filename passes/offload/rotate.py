"""Rotate what the frozen linears read, so that no entry of it is much larger than the others.

    Linear(x, W)  →  Linear(Rotate(x), W·Rᵀ),   R orthogonal and public (`hecompile.graph.rotation`)

The function is unchanged, since (x·Rᵀ)·(W·Rᵀ)ᵀ = x·Wᵀ. Outliers of x and of the rows of W are spread over all columns:
integers of few bits then lose less of W, and an encoded token uses more of its range (Chee et al., QuIP, arXiv 2307.13304;
Ashkboos et al., QuaRot, arXiv 2404.00456). Linears that read one value share its rotation. LoRA reads x as it was.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import torch

from hecompile.graph.ir import (
    DOMAIN,
    ORIGIN,
    add_initializer,
    constant_of,
    in_block,
    module_path,
    nodes_of_type,
    remove_unused,
)
from hecompile.graph.rotation import rotate


@dataclass(frozen=True)
class Rotate(ir.passes.InPlacePass):
    """Rotate the inputs of every Linear inside the decoder layers, and of the output head where `include_head` is set."""

    include_head: bool = False

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        rotated: dict[ir.Value, ir.Value] = {}
        for node in nodes_of_type(model, "Linear"):
            x = node.inputs[0]
            if x is None or not (in_block(node) or self.include_head):
                continue
            if x not in rotated:
                rotated[x] = _insert(model.graph, node, x)
            node.replace_input_with(0, rotated[x])
            _rotate_weight(model.graph, node)
        remove_unused(model)
        return ir.passes.PassResult(model, bool(rotated))

    def ensures(self, model: ir.Model) -> None:
        for node in nodes_of_type(model, "Rotate"):
            if any(consumer.op_type != "Linear" for consumer in node.outputs[0].consumers()):
                raise ir.passes.PostconditionError(f"what {module_path(node)} rotates is read by more than linears")


def _insert(graph: ir.Graph, before: ir.Node, x: ir.Value) -> ir.Value:
    """Put a Rotate of `x` before the first linear that reads it, and return its result."""
    node = ir.node("Rotate", [x], domain=DOMAIN, metadata_props={ORIGIN: module_path(before)})
    result = node.outputs[0]
    result.name, result.type, result.shape = f"{x.name}.rotated", x.type, x.shape
    graph.insert_before(before, [node])
    return result


def _rotate_weight(graph: ir.Graph, node: ir.Node) -> None:
    frozen = node.inputs[1]
    weight = constant_of(frozen)
    assert weight is not None
    turned = rotate(torch.tensor(weight)).numpy()  # [out, in]
    node.replace_input_with(1, add_initializer(graph, f"{module_path(node)}.weight_rotated", turned))
    if frozen is not None and frozen.name is not None and not frozen.uses():
        # At once, and the array too: values outlive their graph in reference cycles.
        del graph.initializers[frozen.name]
        frozen.const_value = None
