"""Merging an adapter into the frozen weights of a graph that attach_lora has extended."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from hecompile.errors import InputError, LegalityError
from hecompile.graph.ir import add_initializer, attribute, constant_of, module_path, nodes_of_type, remove_unused


def merge_lora(model: ir.Model, adapter: Mapping[str, np.ndarray]) -> ir.Model:
    """W ← W + scaling·B·A for every Lora branch, in place, before quantisation; the branches and their inputs go.

    `adapter`: PEFT's names → f32 matrices, A [r, in] and B [out, r]. Returns `model`. Raises InputError when names or shapes
    differ from the graph's, LegalityError where a branch does not stand beside a Linear of a frozen weight.
    """
    graph = model.graph
    wanted = {str(value.name): value for value in graph.inputs if ".lora_" in str(value.name)}
    if wanted.keys() != adapter.keys():
        raise InputError(f"the adapter and the graph differ in {', '.join(sorted(wanted.keys() ^ adapter.keys())[:3])}")
    for name, value in wanted.items():
        assert value.shape is not None
        if tuple(adapter[name].shape) != tuple(value.shape.numpy()):
            raise InputError(f"adapter matrix {name} has shape {adapter[name].shape}, the graph takes {value.shape}")
    for branch in nodes_of_type(model, "Lora"):
        _, a, b = (str(value.name) for value in branch.inputs if value is not None)
        delta = float(attribute(branch, "scaling")) * (adapter[b] @ adapter[a])  # type: ignore[arg-type]  # [out, in]
        total = next(iter(branch.outputs[0].consumers()), None)
        linears = [v.producer() for v in total.inputs if v is not None] if total is not None else []
        linear = next((node for node in linears if node is not None and node.op_type == "Linear"), None)
        weight = None if linear is None else constant_of(linear.inputs[1])
        if total is None or total.op_type != "Add" or linear is None or weight is None:
            raise LegalityError(f"the LoRA branch of {module_path(branch)} does not stand beside a frozen Linear")
        merged = add_initializer(graph, f"{module_path(linear)}.merged", (weight + delta).astype(np.float32))
        linear.replace_input_with(1, merged)
        ir.convenience.replace_all_uses_with(total.outputs[0], linear.outputs[0], replace_graph_outputs=True)
        linear.outputs[0].type, linear.outputs[0].shape = total.outputs[0].type, total.outputs[0].shape
        graph.remove(total, safe=True)
    remove_unused(model)
    for value in wanted.values():
        graph.inputs.remove(value)
    return model
