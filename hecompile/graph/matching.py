"""Find the attentions of a graph in each of their forms, for the passes that fuse, approximate or measure them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from hecompile.graph.ir import ATTENTION_OPERATORS, DOMAIN, attribute, constant_of, nodes_of_type

_TRANSPOSED = (0, 1, 3, 2)
"""The permutation that turns k [B, heads, S, D] into kᵀ."""


@dataclass(frozen=True)
class AttentionParts:
    """Hold the inputs of an attention: q, k and v [B, heads, S, D], bias broadcast to [B, heads, S, S], factor of q·kᵀ."""

    q: ir.Value
    k: ir.Value
    v: ir.Value
    bias: ir.Value
    scale: float


def attentions(model: ir.Model) -> Iterator[tuple[ir.Node, AttentionParts]]:
    """Yield each attention in graph order with the node that makes its result: decomposed, fused or approximated."""
    for node in list(model.graph):
        if node.op_type == "MatMul" and not node.domain:
            parts = match_attention(node)
        elif node.domain == DOMAIN and node.op_type in ATTENTION_OPERATORS:
            q, k, v, bias = (value for value in node.inputs if value is not None)
            parts = AttentionParts(q, k, v, bias, float(attribute(node, "scale")))  # type: ignore[arg-type]
        else:
            continue
        if parts is not None:
            yield node, parts


def softmax_attentions(model: ir.Model) -> Iterator[tuple[ir.Node, AttentionParts]]:
    """Yield the decomposed attentions alone: MatMul(Softmax(Add(Mul(MatMul(q, kᵀ), c), bias)), v)."""
    for node in nodes_of_type(model, "MatMul", domain=""):
        if (parts := match_attention(node)) is not None:
            yield node, parts


def match_attention(node: ir.Node) -> AttentionParts | None:
    """Match the attention that ends in the MatMul `node`; None where there is none."""
    weights, v = node.inputs
    softmax = producer_of(weights, "Softmax")
    if softmax is None or v is None or _axis(softmax) != -1:
        return None
    biased = producer_of(softmax.inputs[0], "Add")
    if biased is None:
        return None
    for scaled_value, bias in either_order(biased):
        scaled = producer_of(scaled_value, "Mul")
        if scaled is None:
            continue
        for scores_value, factor in either_order(scaled):
            scores, scale = producer_of(scores_value, "MatMul"), constant_of(factor)
            if scores is None or scale is None or scale.size != 1:
                continue
            q, transposed = scores.inputs
            transpose = producer_of(transposed, "Transpose")
            if q is None or transpose is None or tuple(attribute(transpose, "perm")) != _TRANSPOSED:  # type: ignore[arg-type]
                continue
            k = transpose.inputs[0]
            assert k is not None
            return AttentionParts(q, k, v, bias, float(scale))
    return None


def producer_of(value: ir.Value | None, op_type: str, domain: str = "") -> ir.Node | None:
    """Return the node that makes `value`, if it is of that operator and makes it for one use only."""
    producer = None if value is None else value.producer()
    if value is None or producer is None or (producer.op_type, producer.domain) != (op_type, domain):
        return None
    # A transpose is free: it may be shared. Anything else that is used elsewhere would be computed twice.
    single = len(value.uses()) == 1 and not value.is_graph_output()
    return producer if single or op_type == "Transpose" else None


def either_order(node: ir.Node) -> list[tuple[ir.Value, ir.Value]]:
    """Return the two inputs of a commutative node in both orders."""
    first, second = node.inputs
    assert first is not None and second is not None
    return [(first, second), (second, first)]


def _axis(softmax: ir.Node) -> object:
    return attribute(softmax, "axis") if "axis" in softmax.attributes else -1
