"""Cut a client plan where training begins to matter, so that what the worker gave before is kept and never asked for again.

    tokens → … frozen linears of lower layers … → h → Lora, RemoteLinear …
      →  prefix:  tokens → … → h                   once per text
         rest:    tokens, h → Lora, RemoteLinear …  in every step; h is a graph input

What depends on no LoRA matrix is a constant of the text (`hecompile.graph.gradients`). The prefix has all such values that a
worker's product is needed for; what follows from tokens and positions alone is computed anew, it costs no request. Kept are
the values of a minimum vertex cut between the worker's constant products and whatever training changes, a value [B, S, F]
costing F: the residual stream at a boundary, not the four tensors that are made of it (Ford and Fulkerson, 1956).

The last constant products, those that lead to no other, are kept as well where `products` is set: at the boundary, or in the
first layer of a plan with adapters everywhere, that of queries, keys and values. Exact, up to how values are kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import networkx as nx
import onnx_ir as ir

from hecompile.graph.gradients import trained_values
from hecompile.graph.ir import nodes_of_type, remove_unused


@dataclass(frozen=True)
class PrefixPlan:
    """Hold a plan in two parts.

    Attributes:
        kept: names of the values [B, S, F] at the cut, with F.
        prefix: graph that computes them from the plan's data inputs.
        rest: the plan, with them as further inputs.
    """

    kept: dict[str, int]
    prefix: ir.Model
    rest: ir.Model

    @property
    def features(self) -> int:
        """Return how many numbers are kept of a token."""
        return sum(self.kept.values())


@dataclass(frozen=True)
class CutPrefix:
    """Cut a client plan, fused or not. products: keep the last constant products too."""

    products: bool = True

    def __call__(self, model: ir.Model) -> PrefixPlan | None:
        """Return `model` in two parts, and leave it as it is; None where no constant product is worth keeping."""
        trained = trained_values(model)
        constant = [node for node in nodes_of_type(model, "RemoteLinear") if node.outputs[0] not in trained]
        sources = constant if self.products else [node for node in constant if _leads_on(node, trained)]
        kept = _minimum_cut(model, sources, trained)
        if not kept:
            return None
        features = {str(value.name): _features(value, model) or 0 for value in kept}
        return PrefixPlan(features, _prefix(model, features), _rest(model, features))


def _leads_on(node: ir.Node, trained: frozenset[ir.Value]) -> bool:
    """Tell whether another constant product is computed from that of `node`."""
    seen, left = {node}, [node]
    while left:
        for output in left.pop().outputs:
            for consumer in output.consumers():
                if consumer in seen or all(value in trained for value in consumer.outputs):
                    continue
                if consumer.op_type == "RemoteLinear":
                    return True
                seen.add(consumer)
                left.append(consumer)
    return False


def _minimum_cut(model: ir.Model, sources: Iterable[ir.Node], trained: frozenset[ir.Value]) -> list[ir.Value]:
    """Return the smallest values, in graph order, through which all goes from `sources` to what training changes.

    A product that is no source is asked for again, and so stands on the other side. The list is empty where no values do.
    """
    cut, begin = nx.DiGraph(), set(sources)
    cut.add_nodes_from(("products", "training"))
    reached: dict[ir.Value, None] = {}
    for node in model.graph:
        derived = [value for value in node.inputs if value in reached]
        again = node.outputs[0] in trained or (node.op_type == "RemoteLinear" and node not in begin)
        for value in derived:
            cut.add_edge(("after", value), "training" if again else node)  # no capacity: infinite
        if again or not (derived or node in begin):
            continue
        if node in begin:
            cut.add_edge("products", node)
        for output in node.outputs:
            reached[output] = None
            features = _features(output, model)
            cut.add_edge(node, ("before", output))
            cut.add_edge(("before", output), ("after", output), **({} if features is None else {"capacity": features}))
    for output in model.graph.outputs:
        if output in reached:
            cut.add_edge(("after", output), "training")
    try:
        _, (near, _) = nx.minimum_cut(cut, "products", "training")
    except nx.NetworkXUnbounded:  # something of another shape passes between the two
        return []
    return [value for value in reached if ("before", value) in near and ("after", value) not in near]


def _features(value: ir.Value, model: ir.Model) -> int | None:
    """Return F of a value [B, S, F] of real numbers; None for another, which cannot be kept by position."""
    (tokens, *_) = model.graph.inputs
    shape = value.shape or _shape_of_product(value.producer())
    if shape is None or tokens.shape is None or value.dtype not in (None, ir.DataType.FLOAT) or len(shape) != 3:
        return None
    last = shape[2]
    return last if isinstance(last, int) and tuple(shape)[:2] == tuple(tokens.shape) else None


def _shape_of_product(node: ir.Node | None) -> ir.Shape | None:
    """Return the shape of a remote product whose node was made without one: that of x, with an output for each scale."""
    if node is None or node.op_type != "RemoteLinear":
        return None
    x, scale = node.inputs
    if x is None or scale is None or x.shape is None or scale.shape is None:
        return None
    return ir.Shape([*tuple(x.shape)[:-1], scale.shape[0]])


def _prefix(model: ir.Model, kept: Iterable[str]) -> ir.Model:
    part = model.clone()
    made = {str(value.name): value for node in part.graph for value in node.outputs}
    part.graph.outputs[:] = [made[name] for name in kept]
    _drop_unused(part)
    return part


def _rest(model: ir.Model, kept: Iterable[str]) -> ir.Model:
    part = model.clone()
    made = {str(value.name): value for node in part.graph for value in node.outputs}
    for name in kept:
        before = made[name]
        given = ir.Value(name=name, shape=before.shape, type=before.type)
        ir.convenience.replace_all_uses_with(before, given, replace_graph_outputs=True)
        before.name = f"{name}.before"
        part.graph.inputs.append(given)
    _drop_unused(part)
    return part


def _drop_unused(model: ir.Model) -> None:
    """Drop what no output needs, LoRA's matrices included; the data inputs stay."""
    remove_unused(model)
    matrices = [value for value in model.graph.inputs if ".lora_" in str(value.name) and not value.uses()]
    for value in matrices:
        model.graph.inputs.remove(value)
