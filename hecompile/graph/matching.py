"""Find the attentions of a graph in each of their forms, for the passes that fuse, approximate or measure them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from hecompile.errors import LegalityError
from hecompile.graph.ir import ATTENTION_OPERATORS, DOMAIN, attribute, constant_of, nodes_of_type, window_of
from hecompile.graph.lazy import is_lazy

_TRANSPOSED = (0, 1, 3, 2)
"""The permutation that turns k [B, heads, S, D] into kᵀ."""


@dataclass(frozen=True)
class AttentionParts:
    """Hold the inputs of an attention: q, k and v [B, heads, S, D], bias broadcast to [B, heads, S, S], factor of q·kᵀ.

    cap: the bound c of scores that are c·tanh(q·kᵀ·scale/c); None where they have none.
    """

    q: ir.Value
    k: ir.Value
    v: ir.Value
    bias: ir.Value
    scale: float
    cap: float | None = None

    @property
    def window(self) -> int | None:
        """Return how many positions a query sees, itself included; None for all before it."""
        return window_of(self.bias)

    @property
    def plain(self) -> bool:
        """Say whether it is softmax over all earlier positions, in whose place a polynomial may stand."""
        return self.cap is None and self.window is None


def attentions(model: ir.Model) -> Iterator[tuple[ir.Node, AttentionParts]]:
    """Yield each plain attention in graph order with the node that makes its result: decomposed, fused or approximated."""
    for node in list(model.graph):
        if node.op_type == "MatMul" and not node.domain:
            parts = match_attention(node)
        elif node.domain == DOMAIN and node.op_type in ATTENTION_OPERATORS:
            q, k, v, bias = (value for value in node.inputs if value is not None)
            cap = float(attribute(node, "cap")) if "cap" in node.attributes else None  # type: ignore[arg-type]
            parts = AttentionParts(q, k, v, bias, float(attribute(node, "scale")), cap)  # type: ignore[arg-type]
        else:
            continue
        if parts is not None and parts.plain:
            yield node, parts


def softmax_attentions(model: ir.Model) -> Iterator[tuple[ir.Node, AttentionParts]]:
    """Yield the decomposed attentions alone, capped and windowed ones too (`match_attention`)."""
    for node in nodes_of_type(model, "MatMul", domain=""):
        if (parts := match_attention(node)) is not None:
            yield node, parts


def match_attention(node: ir.Node) -> AttentionParts | None:
    """Match the attention that ends in the MatMul `node`; None where there is none.

    It is MatMul(Softmax(Add(scores, bias)), v) with scores Mul(MatMul(q, kᵀ), c), MatMul(q, kᵀ), or either of them capped:
    Mul(Tanh(Div(scores, cap)), cap).
    """
    weights, v = node.inputs
    softmax = producer_of(weights, "Softmax")
    if softmax is None or v is None or _axis(softmax) != -1:
        return None
    biased = producer_of(softmax.inputs[0], "Add")
    if biased is None:
        return None
    for value, bias in either_order(biased):
        inner, cap = _uncapped(value)
        scaled, scale = _unscaled(inner)
        scores = producer_of(scaled, "MatMul")
        if scores is None:
            continue
        q, transposed = scores.inputs
        transpose = producer_of(transposed, "Transpose")
        if q is None or transpose is None or tuple(attribute(transpose, "perm")) != _TRANSPOSED:  # type: ignore[arg-type]
            continue
        k = transpose.inputs[0]
        assert k is not None
        return AttentionParts(q, k, v, bias, scale, cap)
    return None


def require_matched_attention(model: ir.Model, masks: Container[str]) -> None:
    """Raise LegalityError where a use of a graph input named in `masks` is no attention that can be matched.

    Clients run sequences packed, and attention alone keeps them apart.
    """
    matched = Counter(parts.bias for _, parts in softmax_attentions(model))
    for mask in model.graph.inputs:
        if mask.name in masks and len(mask.uses()) != matched[mask]:
            raise LegalityError(
                f"{len(mask.uses()) - matched[mask]} attentions of this model have a form that is not known: sequences that "
                "run packed could not be kept apart"
            )


def _uncapped(value: ir.Value) -> tuple[ir.Value | None, float | None]:
    """Return x and c of c·tanh(x/c); `value` itself and None where it is something else."""
    outer = producer_of(value, "Mul")
    for inner, factor in [] if outer is None else either_order(outer):
        tanh, cap = producer_of(inner, "Tanh"), _scalar(factor)
        division = None if tanh is None else producer_of(tanh.inputs[0], "Div")
        if division is not None and cap is not None and _scalar(division.inputs[1]) == cap:
            return division.inputs[0], cap
    return value, None


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """Return x and c of x·c; `value` itself and 1 where it is something else."""
    product = producer_of(value, "Mul")
    for inner, factor in [] if product is None else either_order(product):
        if (scale := _scalar(factor)) is not None:
            return inner, scale
    return value, 1.0


def _scalar(value: ir.Value | None) -> float | None:
    if is_lazy(value):
        return None  # a large one
    array = constant_of(value)
    return float(array) if array is not None and array.size == 1 else None


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
