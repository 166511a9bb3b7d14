"""Insert refreshes where the levels of a leveled scheme run out, of as few numbers as possible.

    y = f(x)  →  y = f(Refresh(x))   for the chosen x, in every node that reads it

A refresh decrypts and encrypts again, at the client of the interactive runtime (a scheme with bootstrapping would do it on
the worker); its price is the number of entries of the tensor per entry of the batch. No value then uses more than `levels`
levels since its last refresh, counted as in `hecompile.polynomial.depth`. The placement is the cheapest one
(`hecompile.polynomial.refresh_placement`: an integer programme over cuts); where the search was cut short, the proven
bound is in the metadata beside the price. The function of the graph is unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from hecompile.errors import InputError
from hecompile.graph.ir import DOMAIN, ORIGIN, module_path
from hecompile.polynomial.depth import elements, levels, levels_used
from hecompile.polynomial.refresh_placement import Vertex, cheapest_refreshes

METADATA = "hecompile.refreshes"


@dataclass(frozen=True)
class PlaceRefreshes(ir.passes.InPlacePass):
    """Insert the cheapest refreshes.

    levels: number that the parameters offer between refreshes. masks_are_free: as for the depth pass.
    Raises InputError for `levels` under 1.
    """

    levels: int
    masks_are_free: bool = True

    def __post_init__(self) -> None:
        if self.levels < 1:
            raise InputError(f"at least one level is needed between refreshes, got {self.levels}")

    def requires(self, model: ir.Model) -> None:
        if any(node.op_type == "Refresh" for node in model.graph):
            raise ir.passes.PreconditionError("the graph has refreshes already")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        values = list(levels(model, self.masks_are_free))  # inputs first, then in graph order
        index = {value: number for number, value in enumerate(values)}
        vertices = [_vertex(value, index, self.masks_are_free) for value in values]
        placement = cheapest_refreshes(vertices, self.levels)
        for number in placement.refreshed:
            _refresh(model.graph, values[number])
        numbers = {"price": placement.price, "bound": placement.bound, "levels": self.levels}
        model.metadata_props.update({f"{METADATA}.{name}": f"{value:.0f}" for name, value in numbers.items()})
        return ir.passes.PassResult(model, bool(placement.refreshed))

    def ensures(self, model: ir.Model) -> None:
        for value, used in levels(model, self.masks_are_free).items():
            if used > self.levels:
                raise ir.passes.PostconditionError(f"{value.name} uses {used} levels of {self.levels}")


def _vertex(value: ir.Value, index: dict[ir.Value, int], masks_are_free: bool) -> Vertex:
    node = value.producer()
    if node is None:
        return Vertex((), 0, elements(value))
    operands = tuple(sorted({index[operand] for operand in node.inputs if operand is not None and operand in index}))
    return Vertex(operands, levels_used(node, masks_are_free), elements(value))


def _refresh(graph: ir.Graph, value: ir.Value) -> None:
    producer = value.producer()
    assert producer is not None
    consumers = list(value.uses())
    node = ir.node("Refresh", [value], domain=DOMAIN, metadata_props={ORIGIN: module_path(producer)})
    fresh = node.outputs[0]
    fresh.name, fresh.type, fresh.shape = f"{value.name}.fresh", value.type, value.shape
    graph.insert_after(producer, node)
    for consumer, position in consumers:
        consumer.replace_input_with(position, fresh)
