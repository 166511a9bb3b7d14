"""Record what goes into the attentions, norms and activations of a graph while an interpreter runs it.

    attention     q and k, hence scores, exponents and divisors; of every packed sequence by itself
    norm          the variances mean(x²) + ε of its input x
    activation    its input

Calibration measures their ranges (`hecompile.polynomial.ranges`), a check finds those outside their domains
(`hecompile.polynomial.domains`), and range losses penalise them (`hecompile.polynomial.range_penalty`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import onnx_ir as ir
import torch
from torch import Tensor

from hecompile.graph.interpreter import causal_attention_bias
from hecompile.graph.ir import attribute, nodes_of_type
from hecompile.graph.matching import AttentionParts, attentions
from hecompile.graph.operators import Attributes
from hecompile.graph.polynomial_operators import attention_scores, gaussian_exponents, power_weights

NORMS, ACTIVATIONS = ("RMSNorm", "PolynomialRMSNorm"), ("SiLU", "PolynomialSiLU", "ComposedSiLU", "QuantizedSiLU")


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """Hold q and k of an attention, and derive from them what its polynomial is evaluated at.

    Attributes:
        q, k: float [B, heads, S, D], of all rows, or of one packed sequence.
        bias: additive, broadcast to [B, heads, S, S]; 0 where a query sees a key, very negative elsewhere.
        scale: the factor of q·kᵀ.
        share: the part of the run's positions that this sequence has; 1 without packing.
    """

    q: Tensor
    k: Tensor
    bias: Tensor
    scale: float
    share: float = 1.0

    @cached_property
    def mask(self) -> Tensor:
        """Return exp(bias): 1 where a query sees a key, 0 elsewhere."""
        return torch.exp(self.bias)

    @cached_property
    def scores(self) -> Tensor:
        """Return q·kᵀ·scale, [B, heads, S, S]."""
        return attention_scores(self.q, self.k, self.scale)

    @cached_property
    def exponents(self) -> Tensor:
        """Return -‖q - k‖²·scale/2, [B, heads, S, S]; rounding may leave it a little above zero."""
        return gaussian_exponents(self.q, self.k, self.scale)

    def divisors(self, attributes: Attributes) -> Tensor:
        """Return what a PowerAttention with these `attributes` divides by, [B, heads, S, 1]."""
        return power_weights(self.scores, self.mask, attributes)[1]

    def visible(self, values: Tensor) -> Tensor:
        """Return the entries of `values` [B, heads, S, S] whose key the query sees, in one dimension."""
        return values[self.mask.expand_as(values) > 0]


Receive = Callable[[ir.Node, "AttentionInputs | Tensor"], None]
"""Take a node and its inputs: those of an attention, variances [B, S] of a norm, or the input [B, S, F] of an activation."""


def is_approximated(node: ir.Node) -> bool:
    """Tell whether a node computes its function on a domain, with an error bound."""
    return "error_bound" in node.attributes


class NonlinearNodes:
    """Find the attentions, norms and activations of a graph, exact or approximated. Immutable: `record` watches one run.

    selected: which of them to watch; all by default.
    """

    def __init__(self, model: ir.Model, selected: Callable[[ir.Node], bool] = lambda node: True) -> None:
        self.attentions = {node.outputs[0]: (node, parts) for node, parts in attentions(model) if selected(node)}
        self.others = {
            node.outputs[0]: (node, node.inputs[0])
            for op_type in (*NORMS, *ACTIVATIONS)
            for node in nodes_of_type(model, op_type)
            if node.inputs[0] is not None and selected(node)
        }
        self.read = {value for _, parts in self.attentions.values() for value in (parts.q, parts.k, parts.bias)}
        self.read |= {value for _, value in self.others.values()}

    def readers(self) -> Counter[ir.Value]:
        """Count how many of the watched nodes read each value."""
        read = [value for _, parts in self.attentions.values() for value in (parts.q, parts.k, parts.bias)]
        return Counter([*read, *(value for _, value in self.others.values())])

    def __bool__(self) -> bool:
        return bool(self.attentions or self.others)

    def record(
        self,
        receive: Receive,
        graph_inputs: Mapping[str, Tensor] | None = None,
        lengths: Sequence[int] | None = None,
        gradients: bool = False,
    ) -> InputRecorder:
        """Return the observer of one run, which calls `receive` for every node when it has run, in graph order.

        Args:
            graph_inputs: the run's inputs by name; they may be left out where no watched node reads one.
            lengths: of the sequences packed into the only row, each of which attends to its own past alone and is received
                by itself; None for one sequence per row.
            gradients: whether to hand on the tensors of the run, for a loss, and not detached ones.
        """
        return InputRecorder(self, receive, graph_inputs or {}, lengths, gradients)


class InputRecorder:
    """Derive the inputs of nonlinear nodes during one run. Give `observe` to the interpreter."""

    def __init__(
        self,
        nodes: NonlinearNodes,
        receive: Receive,
        graph_inputs: Mapping[str, Tensor],
        lengths: Sequence[int] | None,
        gradients: bool,
    ) -> None:
        self._nodes, self._receive, self._lengths, self._gradients = nodes, receive, lengths, gradients
        self._values: dict[ir.Value, Tensor] = {}
        self._readers = nodes.readers()
        for value in nodes.read:
            if value.is_graph_input() and str(value.name) in graph_inputs:
                self._keep(value, graph_inputs[str(value.name)])

    def observe(self, value: ir.Value, result: Tensor) -> None:
        """Take a value of the run, as an observer of `hecompile.graph.interpreter.Interpreter.run` does."""
        if value in self._nodes.read:
            self._keep(value, result)
        if value in self._nodes.attentions:
            node, parts = self._nodes.attentions[value]
            for inputs in self._attention_inputs(parts):
                self._receive(node, inputs)
            self._drop_read((parts.q, parts.k, parts.bias))
        elif value in self._nodes.others:
            node, read = self._nodes.others[value]
            x = self._values[read]
            variances = node.op_type in NORMS
            self._receive(node, x.pow(2).mean(-1) + float(attribute(node, "epsilon")) if variances else x)  # type: ignore[arg-type]
            self._drop_read((read,))

    def _keep(self, value: ir.Value, tensor: Tensor) -> None:
        self._values[value] = tensor if self._gradients else tensor.detach()

    def _drop_read(self, values: Iterable[ir.Value]) -> None:
        """Let go of values that every node that reads them has received."""
        for value in values:
            self._readers[value] -= 1
            if self._readers[value] == 0 and not value.is_graph_input():
                self._values.pop(value, None)

    def _attention_inputs(self, parts: AttentionParts) -> Iterator[AttentionInputs]:
        q, k = self._values[parts.q], self._values[parts.k]  # [B, heads, S, D]
        if self._lengths is None:
            yield AttentionInputs(q, k, self._values[parts.bias], parts.scale)
            return
        lengths = list(self._lengths)
        for length, query, key in zip(lengths, q.split(lengths, 2), k.split(lengths, 2), strict=True):
            bias = causal_attention_bias(torch.ones(1, length, dtype=torch.int64))
            yield AttentionInputs(query, key, bias, parts.scale, length / sum(lengths))
