"""Read off a client plan what each frozen linear of a transformers model becomes: a part of a product with the worker."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from hecompile.errors import InputError
from hecompile.graph.ir import constant_of, in_block, module_path, nodes_of_type
from hecompile.graph.rotation import rotate

_COLUMN_SCALE = ".column_scale"


@dataclass(frozen=True)
class PlannedProduct:
    """Describe one product of a plan, which computes several linears that read the same input.

    Attributes:
        linear: its name in the plan; the circuits are `<linear>.forward` and `<linear>.backward`.
        modules: module paths of the linears, in the order of their outputs in the product.
        row_scale: float32 [out], of all outputs.
        column_scale: float32 [in], by which inputs are multiplied first; None for ones.
        rotated: whether inputs are rotated after that (`hecompile.graph.rotation`).
    """

    linear: str
    modules: tuple[str, ...]
    row_scale: Tensor
    column_scale: Tensor | None
    rotated: bool

    def prepare(self, x: Tensor) -> Tensor:
        """Return what the worker's matrix is multiplied by, for float32 x [..., in]; differentiable."""
        scaled = x if self.column_scale is None else x * self.column_scale
        return rotate(scaled) if self.rotated else scaled


def products_of(graph: ir.Model) -> tuple[PlannedProduct, ...]:
    """List the products of a client plan, as `ClientBundle.graph` reads it. An output head on the worker is left out.

    Raises InputError for a plan whose products are no modules of the model: experts are one tensor in transformers.
    """
    return tuple(_product(node) for node in nodes_of_type(graph, "RemoteLinear") if in_block(node))


def _product(node: ir.Node) -> PlannedProduct:
    name = module_path(node)
    x, scale = node.inputs
    parent, _, last = name.rpartition(".")
    if "-" in parent or any(part.isdigit() for part in last.split("-")):
        raise InputError(
            f"{name} is an expert of a mixture, which is no module of its own: train this model by `hecompile train`"
        )
    rotated = _made_by(x, "Rotate")
    if rotated is not None:
        x = rotated.inputs[0]
    balanced = _made_by(x, "Mul")
    columns = None if balanced is None else _column_scale(balanced)
    modules = tuple(f"{parent}.{part}" if parent else part for part in last.split("-"))
    return PlannedProduct(name, modules, _tensor(scale), columns, rotated is not None)


def _made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    producer = None if value is None else value.producer()
    return producer if producer is not None and producer.op_type == op_type else None


def _column_scale(node: ir.Node) -> Tensor | None:
    """Return the scale that a Mul balances columns by; None for a Mul of the model's own."""
    for value in node.inputs:
        if value is not None and str(value.name).endswith(_COLUMN_SCALE) and constant_of(value) is not None:
            return _tensor(value)
    return None


def _tensor(value: ir.Value | None) -> Tensor:
    array = constant_of(value)
    assert array is not None
    return torch.tensor(array)  # a copy: the file that it lies in may be unmapped
