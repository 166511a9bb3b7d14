"""Split the graph at the LoRA boundary: a client plan with RemoteLinear nodes, and one worker circuit per product.

    QuantizedLinear(x, Q, s) @worker  →  client:  RemoteLinear(x, s; linear = name)
                                          worker:  name.forward = EncryptedLinear(ciphertext, Qᵀ),
                                                   name.backward = EncryptedLinear(ciphertext, Q), if x needs a gradient

The weights leave the client plan, the scales stay in it. Nothing secret can reach a worker circuit: its only constant is a
frozen weight, whose secrecy is checked here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from hecompile.errors import LegalityError, SecurityError
from hecompile.graph.gradients import without_gradient
from hecompile.graph.ir import (
    DOMAIN,
    ORIGIN,
    PLACEMENT,
    SECRECY,
    attributes_of,
    constant_of,
    module_path,
    nodes_of_type,
    remove_unused,
    replace_node,
)
from hecompile.graph.secrecy import check_placement
from hecompile.he.parameters import LinearParameters
from hecompile.he.weight_norms import measure_norms
from hecompile.plan.circuits import DIRECTIONS, RemoteCircuit, SplitPlan


@dataclass(frozen=True)
class Split:
    """End the graph-to-graph part of the pipeline: yield the client plan and the worker's circuits."""

    def __call__(self, model: ir.Model) -> SplitPlan:
        """Split `model` (consumed). Raises LegalityError without selected parameters, SecurityError on a secret weight."""
        check_placement(model)
        circuits: list[RemoteCircuit] = []
        forward_only = without_gradient(model, "QuantizedLinear")
        for node in nodes_of_type(model, "QuantizedLinear"):
            if node.metadata_props.get(PLACEMENT) == "worker":
                circuits.extend(_circuits(node, DIRECTIONS[:1] if node in forward_only else DIRECTIONS))
                _make_remote(node)
        remove_unused(model)
        return SplitPlan(model, tuple(circuits))


def _circuits(node: ir.Node, directions: Sequence[str]) -> Iterator[RemoteCircuit]:
    name, value = module_path(node), node.inputs[1]
    if value is None or value.metadata_props.get(SECRECY) != "public":
        raise SecurityError(f"the weight of {name} is not marked public; it must not be given to the worker")
    weight = constant_of(value)
    if weight is None or "forward_upload_bits" not in node.attributes:
        raise LegalityError(f"{name}: run quantize and select_parameters before split")
    attributes = attributes_of(node)
    both_norms = measure_norms(torch.from_numpy(weight))
    stored = value.const_value
    assert stored is not None

    def transposed() -> np.ndarray:
        return torch.from_numpy(stored.numpy()).t().contiguous().numpy()  # [in, out]; torch is several times as fast

    for direction, read, norms in zip(DIRECTIONS, (transposed, stored.numpy), both_norms, strict=True):
        if direction not in directions:
            continue
        upload, reply = attributes[f"{direction}_upload_bits"], attributes[f"{direction}_reply_bits"]
        gain = attributes[f"{direction}_gain"]
        parameters = LinearParameters.from_norms(norms, upload_bits=upload, reply_bits=reply, gain=gain)
        yield RemoteCircuit(name, direction, parameters, read, norms, attributes[f"{direction}_crest"])


def _make_remote(node: ir.Node) -> None:
    name = module_path(node)
    remote = ir.node(
        "RemoteLinear",
        [node.inputs[0], node.inputs[2]],
        {"linear": name} | attributes_of(node),
        domain=DOMAIN,
        metadata_props={ORIGIN: name, PLACEMENT: "client"},
    )
    replace_node(node, [remote], remote.outputs)
