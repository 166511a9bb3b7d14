"""Write alike what families of models are exported as differently, so that one set of patterns finds it.

    Reshape(Gemm(Reshape(x, [-1, in]), W, b))          →  Add(MatMul(x, Transpose(W')), b),   W' = Wᵀ  (GPT-2's Conv1D)
    MatMul(x, W)                                        →  MatMul(x, Transpose(W')),           W' = Wᵀ
    SequenceAt(SplitToSequence(x, n), i)                →  output i of Split(x, [n, n, …])
    Add(w, 1)                                           →  w', a constant                       (Gemma's gains)

W, w and b are frozen (initializers). A Gemm is rewritten where the exporter's own shape inference proves that the two
reshapes merge and divide the same dimensions. Exact, but for the rounding of a sum with b.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from hecompile.graph.interpreter import evaluate_node
from hecompile.graph.ir import (
    NAME_SCOPES,
    ORIGIN,
    add_initializer,
    attribute,
    constant_of,
    remove_unused,
    replace_node,
)
from hecompile.graph.lazy import add_constant, is_lazy, lazy_tensor

_FOLDED = frozenset({"Add", "Sub", "Mul", "Div"})
"""Elementwise operators whose result is a constant where all of their inputs are."""


@dataclass(frozen=True)
class Unify(ir.passes.InPlacePass):
    """Rewrite products by frozen weights, splits and sums of constants to the form that the patterns have."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            rule = _RULES.get(node.op_type)
            if rule is not None and not node.domain and rule(model.graph, node):
                modified = True
        if modified:
            remove_unused(model)
        return ir.passes.PassResult(model, modified)


def _turn_product(graph: ir.Graph, node: ir.Node) -> bool:
    x, weight = node.inputs
    if not _is_matrix(weight):
        return False
    product, made = _product(graph, node, x, weight)
    replace_node(node, made, [product])
    _drop_unused(graph, weight)
    return True


def _unfold_gemm(graph: ir.Graph, node: ir.Node) -> bool:
    """Rewrite a Gemm between two reshapes; its sum with b takes the place of the second of them."""
    flat, weight, bias = (*node.inputs, None)[:3]
    before, after = None if flat is None else flat.producer(), _only_consumer(node)
    plain = all(
        attribute(node, name) == value
        for name, value in (("alpha", 1.0), ("beta", 1.0), ("transA", 0), ("transB", 0))
        if name in node.attributes
    )
    if not plain or not _is_matrix(weight) or before is None or before.op_type != "Reshape" or after is None:
        return False
    x = before.inputs[0]
    if x is None or not _merges_rows(x, after.outputs[0]):
        return False
    product, made = _product(graph, node, x, weight)
    product.shape, product.type = after.outputs[0].shape, after.outputs[0].type
    result = product
    if bias is not None:
        product.name = f"{after.outputs[0].name}_product"
        total = ir.node("Add", [product, bias], metadata_props=dict(node.metadata_props))
        made, result = [*made, total], total.outputs[0]
    replace_node(after, made, [result])
    graph.remove(node, safe=True)
    _drop_unused(graph, weight)
    return True


def _name_parts(graph: ir.Graph, node: ir.Node) -> bool:
    """Turn a sequence of equal parts, each taken by a constant index, into the outputs of one Split."""
    x, size = node.inputs[0], constant_of(node.inputs[1])
    takers = list(node.outputs[0].consumers())
    indices = [constant_of(taker.inputs[1]) if taker.op_type == "SequenceAt" else None for taker in takers]
    axis = int(attribute(node, "axis"))  # type: ignore[call-overload]
    if x is None or x.shape is None or size is None or size.size != 1 or any(index is None for index in indices):
        return False
    whole = x.shape[axis]
    if not isinstance(whole, int) or whole % int(size):
        return False
    sizes = np.full(whole // int(size), int(size), dtype=np.int64)
    name = f"{node.outputs[0].name}_sizes"
    split = ir.node(
        "Split",
        [x, add_initializer(graph, name, sizes)],
        {"axis": axis},
        num_outputs=len(sizes),
        metadata_props=dict(node.metadata_props),
    )
    graph.insert_before(node, [split])
    for number, output in enumerate(split.outputs):
        output.name, output.type = f"{node.outputs[0].name}_{number}", x.type
        output.shape = ir.Shape([*x.shape[:axis], int(size), *(x.shape[axis + 1 :] if axis != -1 else ())])
    for taker, index in zip(takers, indices, strict=True):
        assert index is not None
        part = split.outputs[int(index)]
        ir.convenience.replace_all_uses_with(taker.outputs[0], part, replace_graph_outputs=True)
        graph.remove(taker, safe=True)
    graph.remove(node, safe=True)
    return True


def _fold(graph: ir.Graph, node: ir.Node) -> bool:
    """Compute a node all of whose inputs are constants, one of them an initializer."""
    if not any(value is not None and value.is_initializer() for value in node.inputs):
        return False
    if any(is_lazy(value) for value in node.inputs):
        return False  # a matrix, which stays apart
    arrays = [constant_of(value) for value in node.inputs]
    if any(array is None for array in arrays):
        return False
    (result,) = evaluate_node(node, [torch.from_numpy(np.array(array)) for array in arrays])
    folded = add_initializer(graph, f"{node.outputs[0].name}_folded", result.numpy())
    ir.convenience.replace_all_uses_with(node.outputs[0], folded)
    graph.remove(node, safe=True)
    return True


_RULES: dict[str, Callable[[ir.Graph, ir.Node], bool]] = {
    "MatMul": _turn_product,
    "Gemm": _unfold_gemm,
    "SplitToSequence": _name_parts,
    **dict.fromkeys(_FOLDED, _fold),
}


def _product(
    graph: ir.Graph, node: ir.Node, x: ir.Value | None, weight: ir.Value | None
) -> tuple[ir.Value, list[ir.Node]]:
    """Return x·W and its nodes, written MatMul(x, Transpose(W')) with the name scopes of `node`."""
    assert weight is not None
    name = f"{weight.name}_turned"
    turned = graph.initializers.get(name)
    if turned is None:
        turned = add_constant(graph, name, _turned(name, weight))  # [out, in]
    kept = {key: value for key, value in node.metadata_props.items() if key in (NAME_SCOPES, ORIGIN)}
    transpose = ir.node("Transpose", [turned], {"perm": [1, 0]}, metadata_props=dict(kept))
    product = ir.node("MatMul", [x, transpose.outputs[0]], metadata_props=dict(kept))
    return product.outputs[0], [transpose, product]


def _turned(name: str, weight: ir.Value) -> ir.TensorProtocol:
    """Return the transpose of a frozen matrix; it is read when it is wanted where the matrix is."""
    stored = weight.const_value
    assert stored is not None
    if not is_lazy(weight):
        return ir.Tensor(np.ascontiguousarray(stored.numpy().T), name=name)
    rows, columns = stored.shape.numpy()
    return lazy_tensor(name, (columns, rows), stored.dtype.numpy(), lambda: np.ascontiguousarray(stored.numpy().T))


def _is_matrix(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and value.shape is not None and len(value.shape) == 2


def _only_consumer(node: ir.Node) -> ir.Node | None:
    """Return the Reshape that alone reads the result of `node`, or None."""
    consumers = list(node.outputs[0].consumers())
    return consumers[0] if len(consumers) == 1 and consumers[0].op_type == "Reshape" else None


def _merges_rows(x: ir.Value, after: ir.Value) -> bool:
    """Tell whether two values provably have the same dimensions but for the last."""
    if x.shape is None or after.shape is None or len(x.shape) != len(after.shape):
        return False
    pairs = zip(x.shape[:-1], after.shape[:-1], strict=True)
    return all(isinstance(a, int) == isinstance(b, int) and a == b and _known(a) for a, b in pairs)


def _known(dim: int | ir.SymbolicDim) -> bool:
    return isinstance(dim, int) or dim.value is not None  # unnamed dimensions compare equal and prove nothing


def _drop_unused(graph: ir.Graph, weight: ir.Value | None) -> None:
    """Let go of a weight at once: all of them twice would take too much memory."""
    if weight is not None and weight.name is not None and not weight.uses():
        del graph.initializers[weight.name]
        weight.const_value = None
