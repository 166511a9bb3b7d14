"""Remove the exporter's additions to the model: no-op slices, multiplications by one, shapes computed at run time.

    s = Slice(x, 0, INT64_MAX, axis 2);  y = Mul(s, 1.0)             →  uses of y become uses of x
    shape = Concat(batch, sequence, [4], [16]);  y = Reshape(x, shape) →  y = Reshape(x, [0, 0, 4, 16])

A Reshape is rewritten only where the exporter's own shape inference proves it: each symbolic output dimension must be the
input's dimension at the same place (then `0` copies it), and at most one other may be unknown. Exact: no value changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from hecompile.graph.ir import ORIGIN, attribute, constant_of, module_path, replace_node, source_of
from hecompile.graph.lazy import is_lazy

_INT64_MAX = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Simplify(ir.passes.InPlacePass):
    """Remove no-ops, and run-time shapes where they are provable."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type == "Reshape" and (shape := _static_shape(node)) is not None:
                origin = {ORIGIN: module_path(node)}
                target = ir.tensor(np.array(shape, dtype=np.int64))
                constant = ir.node("Constant", [], {"value": target}, metadata_props=origin)
                constant.outputs[0].name = f"{node.outputs[0].name}_shape"
                constant.outputs[0].type = ir.TensorType(ir.DataType.INT64)
                constant.outputs[0].shape = ir.Shape([len(shape)])
                new = ir.node("Reshape", [node.inputs[0], constant.outputs[0]], metadata_props=origin)
                replace_node(node, [constant, new], new.outputs)
                modified = True
            elif _is_no_op(node):
                source = node.inputs[_passed_input(node)]
                assert source is not None
                source.type, source.shape = source.type or node.outputs[0].type, source.shape or node.outputs[0].shape
                ir.convenience.replace_all_uses_with(node.outputs[0], source)
                model.graph.remove(node, safe=True)
                modified = True
        for clean_up in (common.RemoveUnusedNodesPass(), common.CommonSubexpressionEliminationPass()):
            modified |= clean_up(model).modified
        modified |= common.RemoveUnusedNodesPass()(model).modified
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            if _is_no_op(node):
                raise ir.passes.PostconditionError(f"no-op {node.op_type} left: {node.name}")


def _passed_input(node: ir.Node) -> int:
    """Return the index of the input that a no-op hands through."""
    if node.op_type == "Mul" and _is_scalar_one(node.inputs[0]):
        return 1
    return 0


def _is_no_op(node: ir.Node) -> bool:
    if node.domain or node.outputs[0].is_graph_output():
        return False
    if node.op_type == "Identity":
        return True
    if node.op_type == "Slice":
        starts, ends, _, steps = (constant_of(source_of(value)) for value in node.inputs[1:5])
        if starts is None or ends is None or steps is None:
            return False
        return bool((starts == 0).all() and (ends == _INT64_MAX).all() and (steps == 1).all())
    if node.op_type == "Cast":
        return _dtype(node.inputs[0]) == attribute(node, "to")
    if node.op_type == "CastLike":
        return _dtype(node.inputs[0]) is not None and _dtype(node.inputs[0]) == _dtype(node.inputs[1])
    if node.op_type == "Mul":
        return any(_is_scalar_one(value) for value in node.inputs)
    return False


def _dtype(value: ir.Value | None) -> ir.DataType | None:
    """Return the type of a value; the exporter omits it between the parts of one torch operator, where it is the input's."""
    if value is None or value.dtype is not None:
        return None if value is None else value.dtype
    producer = value.producer()
    return _dtype(producer.inputs[0]) if producer is not None and producer.op_type == "Softmax" else None


def _is_scalar_one(value: ir.Value | None) -> bool:
    if is_lazy(value):
        return False  # a large one
    array = constant_of(value)
    return array is not None and array.ndim == 0 and bool(array == 1.0)


def _static_shape(node: ir.Node) -> list[int] | None:
    """Return the constant shape that is provably equal to a computed one, or None."""
    data, shape = node.inputs[:2]
    if data is None or constant_of(shape) is not None:
        return None
    before, after = data.shape, node.outputs[0].shape
    if before is None or after is None:
        return None
    target: list[int] = []
    for axis, dim in enumerate(after):
        if isinstance(dim, int):
            target.append(dim)
        elif axis < len(before) and dim.value is not None and before[axis] == dim:
            target.append(0)  # unnamed dimensions compare equal and prove nothing
        else:
            target.append(-1)
    return target if target.count(-1) <= 1 else None
