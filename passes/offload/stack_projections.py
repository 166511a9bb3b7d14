"""Stack the worker's linears that read the same value, so that it is encrypted and sent once.

    q = QuantizedLinear(x, Qq, sq);  k = QuantizedLinear(x, Qk, sk);  v = QuantizedLinear(x, Qv, sv)
      →  y = QuantizedLinear(x, [Qq; Qk; Qv], [sq; sk; sv]);  q, k, v = Split(y)

Forward one upload serves all; backward the three gradients are concatenated (the gradient of Split) and one product returns
their sum. Exact. The stacked linear is named by its parts: `model.layers.0.self_attn.q_proj-k_proj-v_proj`, and
`model.layers.0.mlp.experts.0-7.gate_up_proj` where they differ in a number alone. A product has 32768 inputs at most,
also backward: siblings with more outputs than that are stacked in several parts, each with an upload of its own.
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
from hecompile.graph.lazy import add_constant, is_lazy, lazy_tensor
from hecompile.plan.circuits import MOST_OUTPUTS


@dataclass(frozen=True)
class StackProjections(ir.passes.InPlacePass):
    """Merge sibling QuantizedLinear nodes on the worker. Raises LegalityError when two groups share a name."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        siblings: dict[ir.Value, list[ir.Node]] = {}
        for node in nodes_of_type(model, "QuantizedLinear"):
            if node.metadata_props.get(PLACEMENT) == "worker" and node.inputs[0] is not None:
                siblings.setdefault(node.inputs[0], []).append(node)
        groups = [part for group in siblings.values() for part in _parts(group) if len(part) > 1]
        for group in groups:
            _stack(model.graph, group)
        remove_unused(model)
        return ir.passes.PassResult(model, bool(groups))

    def ensures(self, model: ir.Model) -> None:
        before: dict[ir.Value | None, int] = {}
        for node in nodes_of_type(model, "QuantizedLinear"):
            if node.metadata_props.get(PLACEMENT) == "worker":
                last, outputs = before.get(node.inputs[0]), _outputs(node)
                if last is not None and last + outputs <= MOST_OUTPUTS:
                    raise ir.passes.PostconditionError(f"{module_path(node)} would upload its input a second time")
                before[node.inputs[0]] = outputs


def _outputs(node: ir.Node) -> int:
    weight = node.inputs[1]
    assert weight is not None and weight.shape is not None
    return int(weight.shape.numpy()[0])


def _parts(group: list[ir.Node]) -> list[list[ir.Node]]:
    """Cut siblings into runs whose outputs one product can take."""
    parts: list[list[ir.Node]] = []
    total = 0
    for node in group:
        total += _outputs(node)
        if not parts or total > MOST_OUTPUTS:
            parts.append([])
            total = _outputs(node)
        parts[-1].append(node)
    return parts


def stacked_name(paths: list[str]) -> str:
    """Join names: `a.b.q_proj`, `a.b.k_proj` → `a.b.q_proj-k_proj`; `a.0.b`, `a.1.b` → `a.0-1.b`.

    Other parts of different parents keep their whole paths.
    """
    if (numbered := _numbered(paths)) is not None:
        return numbered
    parents = {path.rpartition(".")[0] for path in paths}
    if len(parents) == 1:
        parent, names = parents.pop(), "-".join(path.rpartition(".")[2] for path in paths)
        return f"{parent}.{names}" if parent else names
    return "-".join(paths)


def _numbered(paths: list[str]) -> str | None:
    """Return the name of parts that differ in one number alone, which counts up; None for others."""
    words = [path.split(".") for path in paths]
    if len({len(each) for each in words}) > 1:
        return None
    different = [place for place, column in enumerate(zip(*words, strict=True)) if len(set(column)) > 1]
    numbers = [each[different[0]] for each in words] if len(different) == 1 else []
    if not numbers or not numbers[0].isdigit() or numbers != [str(int(numbers[0]) + at) for at in range(len(numbers))]:
        return None
    return ".".join([*words[0][: different[0]], f"{numbers[0]}-{numbers[-1]}", *words[0][different[0] + 1 :]])


def _on_top_of_each_other(name: str, weights: list[ir.Value]) -> ir.TensorProtocol:
    """Return the stacked weight, int8 or, where a part is, int16; it is read when it is wanted where a part is."""
    parts = [weight.const_value for weight in weights if weight.const_value is not None]
    shapes = [part.shape.numpy() for part in parts]
    dtype = np.result_type(*(part.dtype.numpy() for part in parts))

    def read() -> np.ndarray:
        return np.concatenate([part.numpy() for part in parts])

    name = f"{name}.weight_{dtype}"
    if any(is_lazy(weight) for weight in weights):
        return lazy_tensor(name, (sum(rows for rows, _ in shapes), shapes[0][1]), dtype, read)
    return ir.Tensor(read(), name=name)


def _stack(graph: ir.Graph, group: list[ir.Node]) -> None:
    name = stacked_name([module_path(node) for node in group])
    weights = [value for node in group if (value := node.inputs[1]) is not None]
    scales = [constant_of(node.inputs[2]) for node in group]
    stacked_weight = _on_top_of_each_other(name, weights)
    if stacked_weight.name in graph.initializers:
        raise LegalityError(f"{name}: two stacked linears have this name")
    weight = add_constant(graph, str(stacked_weight.name), stacked_weight)
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
