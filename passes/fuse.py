"""Join nodes of the client plan whose intermediate results would only cost memory.

    MatMul(Softmax(Add(Mul(MatMul(q, kᵀ), c), bias)), v)  →  Attention(q, k, v, bias; scale = c)
    Mul(SiLU(gate), up)                                   →  SwiGLU(gate, up)
    Lora(SwiGLU(gate, up), A, B)                          →  GatedLora(SwiGLU(gate, up), A, B, gate, up)

The functions stay what they were, up to the rounding of float32. Attention need not keep the [heads, S, S] weights for its
gradient (Dao et al., FlashAttention, arXiv 2205.14135), SwiGLU (Shazeer, arXiv 2002.05202) not the activated gate, and its
LoRA not SwiGLU's result, the widest tensor of a layer. And an Attention node is the only kind of node left that lets
positions of a sequence see each other, which is what the interpreter needs to know to run packed sequences and to leave out
positions that nobody asks for.

It runs when a client loads its plan, not before: passes that approximate softmax or SiLU want to see them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from hecompile.ir import (
    DOMAIN,
    ORIGIN,
    PLACEMENT,
    attribute,
    constant_of,
    module_path,
    nodes_of_type,
    remove_unused,
    replace_node,
)

_TRANSPOSED = (0, 1, 3, 2)
"""The permutation that turns k [B, heads, S, D] into kᵀ."""


@dataclass(frozen=True)
class _AttentionParts:
    """What the nodes of one attention compute: softmax(q·kᵀ·scale + bias)·v."""

    q: ir.Value
    k: ir.Value
    v: ir.Value
    bias: ir.Value
    scale: float


@dataclass(frozen=True)
class Fuse(ir.passes.InPlacePass):
    """Client plan → client plan with Attention and SwiGLU nodes. A node that does not match is left as it is."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in nodes_of_type(model, "MatMul", domain=""):
            if (parts := _match_attention(node)) is not None:
                _rewrite(node, "Attention", [parts.q, parts.k, parts.v, parts.bias], {"scale": parts.scale})
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


def _match_attention(node: ir.Node) -> _AttentionParts | None:
    """The parts of the attention that ends in the MatMul `node`, or None."""
    weights, v = node.inputs
    softmax = _producer(weights, "Softmax")
    if softmax is None or v is None or _axis(softmax) != -1:
        return None
    biased = _producer(softmax.inputs[0], "Add")
    if biased is None:
        return None
    for scaled_value, bias in _either_order(biased):
        scaled = _producer(scaled_value, "Mul")
        if scaled is None:
            continue
        for scores_value, factor in _either_order(scaled):
            scores, scale = _producer(scores_value, "MatMul"), constant_of(factor)
            if scores is None or scale is None or scale.size != 1:
                continue
            q, transposed = scores.inputs
            transpose = _producer(transposed, "Transpose")
            if q is None or transpose is None or tuple(attribute(transpose, "perm")) != _TRANSPOSED:  # type: ignore[arg-type]
                continue
            k = transpose.inputs[0]
            assert k is not None
            return _AttentionParts(q, k, v, bias, float(scale))
    return None


def _match_swiglu(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """(gate, up) of the Mul `node`, or None."""
    for activated, up in _either_order(node):
        silu = _producer(activated, "SiLU", DOMAIN)
        if silu is not None and silu.inputs[0] is not None:
            return silu.inputs[0], up
    return None


def _rewrite(node: ir.Node, op_type: str, inputs: list[ir.Value], attributes: dict[str, Any]) -> None:
    metadata = {ORIGIN: module_path(node)}
    if PLACEMENT in node.metadata_props:
        metadata[PLACEMENT] = node.metadata_props[PLACEMENT]
    fused = ir.node(op_type, inputs, attributes, domain=DOMAIN, metadata_props=metadata)
    replace_node(node, [fused], fused.outputs)


def _producer(value: ir.Value | None, op_type: str, domain: str = "") -> ir.Node | None:
    """The node that makes `value`, if it is of that operator and makes it for one use only."""
    producer = None if value is None else value.producer()
    if value is None or producer is None or (producer.op_type, producer.domain) != (op_type, domain):
        return None
    # A transpose is free: it may be shared. Anything else that is used elsewhere would be computed twice.
    single = len(value.uses()) == 1 and not value.is_graph_output()
    return producer if single or op_type == "Transpose" else None


def _either_order(node: ir.Node) -> list[tuple[ir.Value, ir.Value]]:
    first, second = node.inputs
    assert first is not None and second is not None
    return [(first, second), (second, first)]


def _axis(softmax: ir.Node) -> object:
    return attribute(softmax, "axis") if "axis" in softmax.attributes else -1
