"""Hearing a run of a graph: what goes into every attention, norm and activation, and what leaves a polynomial's domain."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from hecompile.graph.interpreter import causal_attention_bias
from hecompile.graph.ir import attribute, module_path, nodes_of_type
from hecompile.graph.matching import AttentionParts, attentions
from hecompile.polynomial.ranges import ACTIVATIONS, NORMS, AttentionRange, Interval, demands

Hear = Callable[[ir.Node, "Interval | AttentionRange"], None]
"""A node, and what went into it: variances of a norm, inputs of an activation, or all that is measured of an attention."""


class RangeWatch:
    """Give `observe` to the interpreter, and graph inputs that no node makes too; `hear` is called for every attention, norm
    and activation when it has run, in graph order.

    lengths: of the sequences that are packed into the only row, each of which attends to its own past alone, and is heard by
    itself; None for one sequence per row.
    """

    def __init__(self, model: ir.Model, hear: Hear, lengths: Sequence[int] | None = None) -> None:
        self._hear, self._lengths = hear, lengths
        self._attentions = {node.outputs[0]: (node, parts) for node, parts in attentions(model)}
        self._others = {
            node.outputs[0]: node
            for op_type in (*NORMS, *ACTIVATIONS)
            for node in nodes_of_type(model, op_type)
            if node.inputs[0] is not None
        }
        needed = [value for _, parts in self._attentions.values() for value in (parts.q, parts.k, parts.bias)]
        self._needed = {*needed, *(node.inputs[0] for node in self._others.values())}
        self._seen: dict[ir.Value, Tensor] = {}

    def observe(self, value: ir.Value, result: Tensor) -> None:
        """An observer of `hecompile.graph.interpreter.Interpreter.run`."""
        if value in self._needed:
            self._seen[value] = result.detach()
        if value in self._attentions:
            self._attention(*self._attentions[value])
        elif (node := self._others.get(value)) is not None:
            x = self._seen[node.inputs[0]]  # type: ignore[index]
            if node.op_type in NORMS:
                x = x.pow(2).mean(-1) + attribute(node, "epsilon")  # type: ignore[operator]
            self._hear(node, Interval.of(x))

    def _attention(self, node: ir.Node, parts: AttentionParts) -> None:
        q, k = self._seen[parts.q], self._seen[parts.k]  # [B, heads, S, D]
        if self._lengths is None:
            self._hear(node, AttentionRange.measure(q, k, self._seen[parts.bias], parts.scale))
            return
        for query, key in zip(q.split(list(self._lengths), 2), k.split(list(self._lengths), 2), strict=True):
            bias = causal_attention_bias(torch.ones(1, query.shape[2], dtype=torch.int64))
            self._hear(node, AttentionRange.measure(query, key, bias, parts.scale))


@dataclass(frozen=True)
class Outside:
    """What left the domain of the polynomial of the module `where`, which replaces an "attention", a "norm" or an
    "activation": `what` was seen in the interval `seen`."""

    where: str
    part: str
    what: str
    seen: Interval
    domain: Interval

    def __str__(self) -> str:
        return (
            f"{self.where}: {self.what} between {self.seen.lower:.5g} and {self.seen.upper:.5g}, domain "
            f"[{self.domain.lower:.5g}, {self.domain.upper:.5g}]"
        )


class DomainWatch(RangeWatch):
    """A `RangeWatch` that keeps what left its domain; the first node that anything infinite or NaN went into is the last one
    looked at, for what follows is its consequence."""

    def __init__(self, model: ir.Model, lengths: Sequence[int] | None = None) -> None:
        super().__init__(model, self._check, lengths)
        self._found: dict[tuple[ir.Value, str], Outside] = {}
        self._last: ir.Node | None = None

    @property
    def outside(self) -> tuple[Outside, ...]:
        """In the order of the graph."""
        return tuple(self._found.values())

    def _check(self, node: ir.Node, found: Interval | AttentionRange) -> None:
        # A table has no more values outside of its domain than in it.
        unbounded = "error_bound" in node.attributes and node.op_type != "QuantizedSiLU"
        if not unbounded or self._last not in (None, node):
            return
        for what, seen, lower, upper in demands(node, found):
            if not all(map(math.isfinite, (seen.lower, seen.upper))):
                self._last = node
            if not seen.within(lower, upper):
                key = (node.outputs[0], what)
                if (before := self._found.get(key)) is not None:  # of another sequence
                    seen = Interval.of(torch.tensor([seen.lower, seen.upper, before.seen.lower, before.seen.upper]))
                part = "norm" if node.op_type in NORMS else "activation" if node.op_type in ACTIVATIONS else "attention"
                where = module_path(node) or str(node.outputs[0].name)
                self._found[key] = Outside(where, part, what, seen, Interval(lower, upper))
