"""Store the client's large matrices in the type of 16 bits whose values they have: as the checkpoint stored them.

    y = Gather(E: f32, ids)  →  y = Cast(Gather(E: bf16, ids))       an embedding, of which rows are read
    y = Linear(x, W: f32)    →  y = Linear(x, W: bf16)               an output head, converted piece by piece

Exact: a matrix is narrowed only where every value of it is a bfloat16 or a float16, as those of a checkpoint in that type
are. It halves the largest file of a client that fetches its hints.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from hecompile.graph.ir import DOMAIN, ORIGIN, PLACEMENT, module_path
from hecompile.graph.lazy import is_lazy, lazy_tensor

_ROWS = 2**12
"""Rows that are looked at and converted at a time."""


@dataclass(frozen=True)
class Narrow(ir.passes.InPlacePass):
    """Narrow the float32 matrices of at least `elements` that Gather or Linear alone read, in place."""

    elements: int = 2**20

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for value in list(model.graph.initializers.values()):
            tensor = value.const_value
            if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) != 2 or tensor.size < self.elements:
                continue
            readers = list(value.uses())
            if not readers or not all(_reads_rows(node, index) for node, index in readers):
                continue
            narrowed = _narrowed(tensor.numpy())
            if narrowed is not None:
                value.const_value = _stored(value, narrowed)
                value.type = ir.TensorType(value.const_value.dtype)
                for node in {node for node, _ in readers if node.op_type == "Gather"}:
                    _widen(model.graph, node)
                modified = True
        return ir.passes.PassResult(model, modified)


def _reads_rows(node: ir.Node, index: int) -> bool:
    gathers = (node.domain, node.op_type) == ("", "Gather") and index == 0
    return gathers or ((node.domain, node.op_type) == (DOMAIN, "Linear") and index == 1)


def _stored(value: ir.Value, narrowed: NDArray[np.generic]) -> ir.TensorProtocol:
    """Make the constant of a narrowed matrix, which is made again when it is wanted where that of the wide one is."""
    wide, name = value.const_value, str(value.name)
    if wide is None or not is_lazy(value):
        return ir.Tensor(narrowed, name=name)
    dtype = narrowed.dtype
    return lazy_tensor(name, narrowed.shape, dtype, lambda: wide.numpy().astype(dtype))


def _narrowed(array: NDArray[np.float32]) -> NDArray[np.generic] | None:
    """Return the same values in 16 bits, None where none of the two types has all of them."""
    for dtype in (ir.DataType.BFLOAT16.numpy(), ir.DataType.FLOAT16.numpy()):
        result = np.empty(array.shape, dtype)
        for start in range(0, len(array), _ROWS):
            rows = array[start : start + _ROWS]
            with np.errstate(over="ignore"):
                result[start : start + _ROWS] = rows.astype(dtype)
            if not np.array_equal(result[start : start + _ROWS].astype(np.float32), rows):
                break
        else:
            return result
    return None


def _widen(graph: ir.Graph, node: ir.Node) -> None:
    """Cast what `node` gathers to float32."""
    rows = node.outputs[0]
    metadata = {key: node.metadata_props[key] for key in (PLACEMENT,) if key in node.metadata_props}
    cast = ir.node("Cast", [rows], {"to": ir.DataType.FLOAT}, metadata_props={ORIGIN: module_path(node), **metadata})
    wide = cast.outputs[0]
    wide.type, wide.shape = rows.type, rows.shape
    wide.metadata_props.update(rows.metadata_props)
    name = rows.name
    ir.convenience.replace_all_uses_with(rows, wide, replace_graph_outputs=True)
    cast.replace_input_with(0, rows)
    wide.name, rows.name = name, f"{name}.stored"
    rows.type = node.inputs[0].type if node.inputs[0] is not None else rows.type
    graph.insert_after(node, cast)
