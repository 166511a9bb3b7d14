"""Join nodes of the client plan whose intermediate results would only cost memory.

    MatMul(Softmax(Add(Mul(MatMul(q, kᵀ), c), bias)), v)  →  Attention(q, k, v, bias; scale = c), with window and cap
    Mul(SiLU(gate), up)                                   →  SwiGLU(gate, up)
    Lora(SwiGLU(gate, up), A, B)                          →  GatedLora(SwiGLU(gate, up), A, B, gate, up)

The functions stay what they were, up to the rounding of float32. Attention need not keep the [heads, S, S] weights for its
gradient (Dao et al., FlashAttention, arXiv 2205.14135), SwiGLU (Shazeer, arXiv 2002.05202) not the activated gate, and its
LoRA not SwiGLU's result, the widest tensor of a layer. Attention nodes are then the only ones that let positions of a
sequence see each other. By that the interpreter runs packed sequences and leaves out positions without a wanted output.

It runs when a client loads its plan, not before: passes that approximate softmax or SiLU match them as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from hecompile.graph.ir import (
    DOMAIN,
    ORIGIN,
    PLACEMENT,
    attribute,
    module_path,
    nodes_of_type,
    remove_unused,
    replace_node,
)
from hecompile.graph.matching import either_order, producer_of, softmax_attentions


@dataclass(frozen=True)
class Fuse(ir.passes.InPlacePass):
    """Fuse attentions, SwiGLUs and their LoRA branches. A node that does not match is left as it is."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node, parts in softmax_attentions(model):
            attributes = {"scale": parts.scale, "window": parts.window, "cap": parts.cap}
            given = {name: value for name, value in attributes.items() if value is not None}
            _rewrite(node, "Attention", [parts.q, parts.k, parts.v, parts.bias], given)
            modified = True
        for node in nodes_of_type(model, "Mul", domain=""):
            if (operands := _match_swiglu(node)) is not None:
                _rewrite(node, "SwiGLU", list(operands), {})
                modified = True
        for node in nodes_of_type(model, "Lora"):
            x = node.inputs[0]
            gated = None if x is None else x.producer()
            if gated is not None and (gated.op_type, gated.domain) == ("SwiGLU", DOMAIN):
                names = ("scaling", "dropout")
                inputs = [value for value in (*node.inputs, *gated.inputs) if value is not None]
                _rewrite(node, "GatedLora", inputs, {name: attribute(node, name) for name in names})
                modified = True
        if modified:
            remove_unused(model)
        return ir.passes.PassResult(model, modified)


def _match_swiglu(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """Match the Mul `node` and return its (gate, up), or None."""
    for activated, up in either_order(node):
        silu = producer_of(activated, "SiLU", DOMAIN)
        if silu is not None and silu.inputs[0] is not None:
            return silu.inputs[0], up
    return None


def _rewrite(node: ir.Node, op_type: str, inputs: list[ir.Value], attributes: dict[str, Any]) -> None:
    metadata = {ORIGIN: module_path(node)}
    if PLACEMENT in node.metadata_props:
        metadata[PLACEMENT] = node.metadata_props[PLACEMENT]
    fused = ir.node(op_type, inputs, attributes, domain=DOMAIN, metadata_props=metadata)
    replace_node(node, [fused], fused.outputs)
