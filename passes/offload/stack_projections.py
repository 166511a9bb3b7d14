"""Stack the worker's linears that read the same value, so that it is encrypted and sent once.

    q = QuantizedLinear(x, Qq, sq);  k = QuantizedLinear(x, Qk, sk);  v = QuantizedLinear(x, Qv, sv)
      →  y = QuantizedLinear(x, [Qq; Qk; Qv], [sq; sk; sv]);  q, k, v = Split(y)

Forward one upload serves all; backward the three gradients are concatenated (the gradient of Split) and one product returns
their sum. Exact. The stacked linear is named by its parts: `model.layers.0.self_attn.q_proj-k_proj-v_proj`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from hecompile.errors import LegalityError
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
)


@dataclass(frozen=True)
class StackProjections(ir.passes.InPlacePass):
    """Merge sibling QuantizedLinear nodes on the worker. Raises LegalityError when two groups share a name."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        siblings: dict[ir.Value, list[ir.Node]] = {}
        for node in nodes_of_type(model, "QuantizedLinear"):
            if node.metadata_props.get(PLACEMENT) == "worker" and node.inputs[0] is not None:
                siblings.setdefault(node.inputs[0], []).append(node)
        groups = [group for group in siblings.values() if len(group) > 1]
        for group in groups:
            _stack(model.graph, group)
        remove_unused(model)
        return ir.passes.PassResult(model, bool(groups))

    def ensures(self, model: ir.Model) -> None:
        seen: set[ir.Value | None] = set()
        for node in nodes_of_type(model, "QuantizedLinear"):
            if node.metadata_props.get(PLACEMENT) == "worker":
                if node.inputs[0] in seen:
                    raise ir.passes.PostconditionError(f"{module_path(node)} would upload its input a second time")
                seen.add(node.inputs[0])


def stacked_name(paths: list[str]) -> str:
    """Join names: `a.b.q_proj`, `a.b.k_proj` → `a.b.q_proj-k_proj`; parts of different parents keep their whole paths."""
    parents = {path.rpartition(".")[0] for path in paths}
    if len(parents) == 1:
        parent, names = parents.pop(), "-".join(path.rpartition(".")[2] for path in paths)
        return f"{parent}.{names}" if parent else names
    return "-".join(paths)


def _stack(graph: ir.Graph, group: list[ir.Node]) -> None:
    name = stacked_name([module_path(node) for node in group])
    weights = [constant_of(node.inputs[1]) for node in group]
    scales = [constant_of(node.inputs[2]) for node in group]
    stacked_weight = np.concatenate([weight for weight in weights if weight is not None])
    weight_name = f"{name}.weight_{stacked_weight.dtype}"
    if weight_name in graph.initializers:
        raise LegalityError(f"{name}: two stacked linears have this name")
    weight = add_initializer(graph, weight_name, stacked_weight)
    scale = add_initializer(graph, f"{name}.weight_scale", np.concatenate(scales))  # type: ignore[arg-type]
    sizes = add_initializer(graph, f"{name}.split", np.array([len(s) for s in scales if s is not None], dtype=np.int64))
    for value in (weight, scale, sizes):
        value.metadata_props[SECRECY] = "public"
    stacked = ir.node(
        "QuantizedLinear",
        [group[0].inputs[0], weight, scale],
        domain=DOMAIN,
        metadata_props={ORIGIN: name, PLACEMENT: "worker"},
    )
    first = group[0].outputs[0]
    total = stacked.outputs[0]
    total.name = f"{name}.out"
    total.type = first.type
    if first.shape is not None:
        total.shape = ir.Shape([*first.shape[:-1], int(sum(len(s) for s in scales if s is not None))])
    total.metadata_props[SECRECY] = first.metadata_props.get(SECRECY, "secret")
    split = ir.node(
        "Split",
        [total, sizes],
        {"axis": -1},
        num_outputs=len(group),
        metadata_props={ORIGIN: name, PLACEMENT: "client"},
    )
    graph.insert_before(group[0], [stacked, split])
    for node, output in zip(group, split.outputs, strict=True):
        before = node.outputs[0]
        output.type, output.shape = before.type, before.shape
        output.metadata_props.update(before.metadata_props)
        name_of_output = before.name
        ir.convenience.replace_all_uses_with(before, output, replace_graph_outputs=True)
        before.name = None
        output.name = name_of_output
        graph.remove(node, safe=True)
