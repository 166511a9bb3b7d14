"""Balance and rotate what the frozen linears read, so that no entry of it matters much more than the others.

    Linear(x, W)  →  Linear(Rotate(Mul(x, c)), W·diag(1/c)·Rᵀ),   c_j = ν_j / min(max(ν_j, 1/2), 2)

R is orthogonal and public (`hecompile.graph.rotation`), ν_j the norm of column j of W over their mean. The function is
unchanged, for the two products with c cancel and so do those with R. Outliers of x and of the rows of W are spread over all
columns: integers of few bits then lose less of W, and an encoded token uses more of its range (Chee et al., QuIP, arXiv
2307.13304; Ashkboos et al., QuaRot, arXiv 2404.00456).

The gradient of x is spread likewise, and so are errors of it. Without c they would drown the entries that are small because
their column of W is, and that a gain before it makes large again (scales as in Xiao et al., SmoothQuant, arXiv 2211.10438).
Linears that read one value share c and the rotation. LoRA reads x as it was.
A weight that is read when it is wanted (`hecompile.graph.lazy`) is rotated then.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

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
from hecompile.graph.lazy import add_constant, is_lazy, lazy_tensor
from hecompile.graph.rotation import rotate

_SPREAD = 2.0
"""How far column norms may lie from their mean: nearer, scales would only move errors from small columns to large ones."""

_SMALLEST = 1e-6
"""Column norms of less than this share of the mean are taken for zeros."""


@dataclass(frozen=True)
class Rotate(ir.passes.InPlacePass):
    """Rotate the inputs of every Linear inside the decoder layers, and of the output head where `include_head` is set."""

    include_head: bool = False

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        readers: dict[ir.Value, list[ir.Node]] = {}
        for node in nodes_of_type(model, "Linear"):
            if node.inputs[0] is not None and (in_block(node) or self.include_head):
                readers.setdefault(node.inputs[0], []).append(node)
        for x, nodes in readers.items():
            balance = _balance(nodes)
            rotated = _insert(model.graph, nodes[0], x, balance)
            for node in nodes:
                node.replace_input_with(0, rotated)
                _replace_weight(model.graph, node, balance)
        remove_unused(model)
        return ir.passes.PassResult(model, bool(readers))

    def ensures(self, model: ir.Model) -> None:
        for node in nodes_of_type(model, "Rotate"):
            if any(consumer.op_type != "Linear" for consumer in node.outputs[0].consumers()):
                raise ir.passes.PostconditionError(f"what {module_path(node)} rotates is read by more than linears")


def _weight(node: ir.Node) -> Tensor:
    weight = constant_of(node.inputs[1])
    assert weight is not None
    return torch.tensor(weight)  # [out, in]


def _balance(nodes: list[ir.Node]) -> Tensor:
    """Return c, f32 [in], of the weights [out, in] of nodes, which stand on top of each other."""
    return _scales(torch.stack([torch.linalg.vector_norm(_weight(node), dim=0) for node in nodes]).norm(dim=0))


def _scales(norms: Tensor) -> Tensor:
    """Return c of the norms of columns, both f32 [in].

    It is 1 for columns of zeros and for those that are not finite, which are refused later.
    """
    known = torch.isfinite(norms) & (norms > 0)
    if not bool(known.any()):
        return torch.ones_like(norms)
    relative = norms / norms[known].mean()
    return torch.where(known & (relative > _SMALLEST), relative / relative.clamp(1 / _SPREAD, _SPREAD), 1.0)


def _insert(graph: ir.Graph, before: ir.Node, x: ir.Value, balance: Tensor) -> ir.Value:
    """Put Mul and Rotate of `x` before the first linear that reads it, and return their result."""
    origin = module_path(before)
    columns = add_initializer(graph, f"{origin}.column_scale", balance.numpy())
    balanced = ir.node("Mul", [x, columns], metadata_props={ORIGIN: origin})
    rotated = ir.node("Rotate", [balanced.outputs[0]], domain=DOMAIN, metadata_props={ORIGIN: origin})
    for value, name in ((balanced.outputs[0], "balanced"), (rotated.outputs[0], "rotated")):
        value.name, value.type, value.shape = f"{x.name}.{name}", x.type, x.shape
    graph.insert_before(before, [balanced, rotated])
    return rotated.outputs[0]


def _replace_weight(graph: ir.Graph, node: ir.Node, balance: Tensor) -> None:
    frozen, name = node.inputs[1], f"{module_path(node)}.weight_rotated"
    assert frozen is not None and frozen.shape is not None
    if is_lazy(frozen):
        stored = frozen.const_value
        assert stored is not None
        tensor = lazy_tensor(name, frozen.shape.numpy(), np.float32, lambda: _rotated(stored.numpy(), balance))
        node.replace_input_with(1, add_constant(graph, name, tensor))
    else:
        node.replace_input_with(1, add_initializer(graph, name, _rotated(_weight(node).numpy(), balance)))
    if frozen.name is not None and not frozen.uses():
        # At once, and the array too: values outlive their graph in reference cycles.
        del graph.initializers[frozen.name]
        frozen.const_value = None


def _rotated(weight: np.ndarray, balance: Tensor) -> np.ndarray:
    return rotate(torch.from_numpy(weight) / balance).numpy()  # [out, in]
