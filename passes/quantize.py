"""Quantise the frozen weights of the decoder's Linear nodes to int8, one scale per output channel.

    Linear(x, W)  →  QuantizedLinear(x, Q, s),   Q = round(W / s) in [-127, 127],   s_i = max_j |W_ij| / 127

The one integer matrix serves both directions: forward y = (x·Qᵀ) ⊙ s, backward dx = (dy ⊙ s)·Q, the scales being applied
by the client. Symmetric, weights only (activations are encoded per token at run time, without loss to speak of):
the form that converges in Frery et al., arXiv 2505.07329, table 1. |W - Q·s| ≤ s/2 for every element.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from hecompile.errors import InputError
from hecompile.ir import DOMAIN, ORIGIN, add_initializer, constant_of, module_path, nodes_of_type, replace_node

QMAX = 127


@dataclass(frozen=True)
class Quantize(ir.passes.InPlacePass):
    """Quantises every Linear inside the decoder layers, and the output head where `include_head` is set.

    Raises InputError when a weight is not finite.
    """

    include_head: bool = False

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in nodes_of_type(model, "Linear"):
            if ".layers." in module_path(node) or self.include_head:
                _quantize_node(model.graph, node)
                modified = True
        common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        for node in nodes_of_type(model, "QuantizedLinear"):
            weight = node.inputs[1]
            if weight is None or weight.dtype != ir.DataType.INT8:
                raise ir.passes.PostconditionError(f"the weight of {module_path(node)} is not int8")


def quantize_weight(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f32 [out, in] → (int8 [out, in] in [-127, 127], f32 scale [out]). A row of zeros gets scale 0."""
    scale = np.abs(weight).max(axis=1) / QMAX  # [out]
    safe = np.where(scale > 0, scale, 1.0)
    quantized = np.rint(weight / safe[:, None]).astype(np.int8)  # [out, in]
    return quantized, scale.astype(np.float32)


def _quantize_node(graph: ir.Graph, node: ir.Node) -> None:
    path = module_path(node)
    weight = constant_of(node.inputs[1])
    assert weight is not None
    if not np.isfinite(weight).all():
        raise InputError(f"the weight of {path} holds values that are not finite; the checkpoint is damaged")
    quantized, scale = quantize_weight(weight)
    inputs = [
        node.inputs[0],
        add_initializer(graph, f"{path}.weight_int8", quantized),
        add_initializer(graph, f"{path}.weight_scale", scale),
    ]
    new = ir.node("QuantizedLinear", inputs, domain=DOMAIN, metadata_props={ORIGIN: path})
    replace_node(node, [new], new.outputs)
