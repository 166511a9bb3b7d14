"""Read the operators of a plan off its graph: what is drawn of a plan before anything is folded or placed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from hecompile.graph.ir import module_path

_NOT_DRAWN = frozenset({"Constant", "Reshape", "Transpose", "Unsqueeze", "Cast", "Split", "Slice", "Concat"})
"""Operators that only move numbers; the edges go through them."""


@dataclass(frozen=True)
class Quantity:
    """Hold numbers that may differ from layer to layer, and the text they stand in, `{}` in the place of each.

    numbers: empty in a layer that has none of it. is_bytes: whether they are printed as bytes.
    """

    text: str
    numbers: tuple[float, ...]
    is_bytes: bool = False


@dataclass(frozen=True)
class Operator:
    """Describe an operator of a plan.

    Attributes:
        name: unique.
        module: path of the module of the checkpoint that it is part of.
        label: what it computes.
        worker: whether the worker computes it.
        sources: names of the operators whose results it takes.
        facts: numbers that stand in its box.
        arriving, leaving: what crosses between client and worker on the edges to it and from it.
    """

    name: str
    module: str
    label: str
    worker: bool
    sources: tuple[str, ...]
    facts: tuple[Quantity, ...] = ()
    arriving: tuple[Quantity, ...] = ()
    leaving: tuple[Quantity, ...] = ()

    @property
    def crosses(self) -> bool:
        return bool(self.arriving or self.leaving)


Describe = Callable[[ir.Node, str, tuple[str, ...]], Operator]
"""Take a node, the name of its operator and its sources; return the operator."""


def read_operators(model: ir.Model, inputs: list[tuple[ir.Value, Operator]], describe: Describe) -> list[Operator]:
    """Return the operators of a graph in topological order, those of `inputs` first.

    Constants, inputs that are not among `inputs`, and operators that only move numbers are left out.
    """
    drawn: dict[ir.Value, tuple[str, ...]] = {value: (operator.name,) for value, operator in inputs}
    operators = [operator for _, operator in inputs]
    for node in model.graph:
        found = [name for value in node.inputs if value is not None for name in drawn.get(value, ())]
        sources = tuple(dict.fromkeys(found))
        if not sources:
            continue
        names = sources
        if node.op_type not in _NOT_DRAWN:
            operator = describe(node, str(node.outputs[0].name), sources)
            operators.append(operator)
            names = (operator.name,)
        drawn.update(dict.fromkeys(node.outputs, names))
    return operators


def plain(node: ir.Node, name: str, sources: tuple[str, ...], worker: bool) -> Operator:
    """Describe a node by its type and module alone."""
    return Operator(name, module_path(node), node.op_type, worker, sources)
