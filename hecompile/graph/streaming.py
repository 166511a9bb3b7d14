"""Run a graph forward and backward a block at a time, so that memory holds the weights and activations of one block.

    forward    block by block without gradients; what later blocks read is kept
    the end    output head and loss, forward and backward, a sequence at a time: logits are the widest rows
    backward   from the last block to the first: each runs again, now with gradients

(Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174, at the ends of blocks.) A block is what the
checkpoint numbers. Gradients are those of activations alone: weights are frozen, and read again for the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from hecompile.graph.interpreter import Observer, as_tensor, evaluate_node
from hecompile.graph.ir import DOMAIN, constant_of, module_path

OnProduct = Callable[[ir.Node, Tensor, Tensor, Tensor], None]
"""Receives a Linear, its input [..., in], its weight [out, in] and its result [..., out], on the way forward."""
OnGradient = Callable[[ir.Node, Tensor, Tensor, Tensor], None]
"""Receives a Linear, the gradient [..., out] of its result, its own share of that of its input [..., in], and its weight."""
Loss = Callable[[Tensor, slice], Tensor]
"""Returns the loss of the graph's first output [n, ...] for these of the sequences; losses of parts add up to the whole."""


@dataclass(frozen=True)
class Segment:
    """Hold nodes that run together, and the values made before them, or given, that they read."""

    nodes: tuple[ir.Node, ...]
    reads: tuple[ir.Value, ...]

    def constants(self) -> dict[ir.Value, Tensor]:
        """Read every constant of the nodes."""
        found = {}
        for node in self.nodes:
            for value in node.inputs:
                if value is not None and value not in found and (array := constant_of(value)) is not None:
                    found[value] = as_tensor(array)
        return found


class StreamedRun:
    """Run `model` on `inputs` by name; gradients begin at the inputs of its Linear nodes, before which all is frozen."""

    def __init__(
        self,
        model: ir.Model,
        inputs: Mapping[str, Tensor],
        observe: Observer,
        on_gradient: OnGradient,
        on_product: OnProduct | None = None,
    ) -> None:
        *self._body, self._end = segments(model)
        self._output = model.graph.outputs[0]
        self._values: dict[ir.Value, Tensor] = {value: inputs[str(value.name)] for value in model.graph.inputs}
        self._observe, self._on_gradient, self._on_product = observe, on_gradient, on_product
        self._tracked = _tracked(model)

    def run(self, sequences: int, loss: Loss) -> None:
        """Run forward, and backward from the loss of `sequences` sequences."""
        for segment in self._body:
            with torch.no_grad():
                self._values |= self._evaluate(segment, segment.constants(), self._values, self._observe)
        gradients = self._run_end(sequences, loss)
        for segment in reversed(self._body):
            self._run_back(segment, gradients)

    def _run_end(self, sequences: int, loss: Loss) -> dict[ir.Value, Tensor]:
        """Run the last segment both ways; return the gradients of what it reads."""
        constants, parts = self._end.constants(), []
        for rows in self._parts(sequences):
            leaves = self._leaves(self._end, rows)
            with torch.enable_grad():
                made = self._evaluate(self._end, constants, leaves, self._observe)
                loss(made[self._output], rows).backward()
            parts.append({value: leaf.grad for value, leaf in leaves.items() if leaf.grad is not None})
        return {value: torch.cat([part[value] for part in parts]) for value in parts[0]}

    def _parts(self, sequences: int) -> Iterator[slice]:
        """Cut the sequences one by one where all that the end reads is one value with a row for each of them."""
        alone = len(self._end.reads) == 1 and len(self._values[self._end.reads[0]]) == sequences
        step = 1 if alone else sequences
        for start in range(0, sequences, step):
            yield slice(start, start + step)

    def _run_back(self, segment: Segment, gradients: dict[ir.Value, Tensor]) -> None:
        """Run a segment again, and its gradients back into those of what it reads."""
        if not any(output in gradients for node in segment.nodes for output in node.outputs):
            return
        leaves = self._leaves(segment)
        with torch.enable_grad():
            made = self._evaluate(segment, segment.constants(), leaves)
            ends = [value for value in made if value in gradients and made[value].requires_grad]
            torch.autograd.backward([made[value] for value in ends], [gradients.pop(value) for value in ends])
        for value, leaf in leaves.items():
            if leaf.grad is not None:
                gradients[value] = leaf.grad + gradients[value] if value in gradients else leaf.grad

    def _leaves(self, segment: Segment, rows: slice | None = None) -> dict[ir.Value, Tensor]:
        found = {}
        for value in segment.reads:
            whole = self._values[value]
            part = whole if rows is None or len(segment.reads) > 1 else whole[rows]
            begins = value in self._tracked and part.is_floating_point()
            found[value] = part.detach().requires_grad_() if begins else part
        return found

    def _evaluate(
        self,
        segment: Segment,
        constants: Mapping[ir.Value, Tensor],
        given: Mapping[ir.Value, Tensor],
        observe: Observer | None = None,
    ) -> dict[ir.Value, Tensor]:
        """Return what the nodes of a segment make and something reads."""
        here = set(segment.nodes)
        last = {value: at for at, node in enumerate(segment.nodes) for value in node.inputs if value is not None}
        values = {**given, **constants}
        made: dict[ir.Value, Tensor] = {}
        for at, node in enumerate(segment.nodes):
            arguments = [None if value is None else values[value] for value in node.inputs]
            for value, result in zip(node.outputs, self._results(node, arguments), strict=True):
                values[value] = result
                if observe is not None:
                    observe(value, result.detach())
                if value is self._output or any(user not in here for user in value.consumers()):
                    made[value] = result
            if observe is not None and self._on_product is not None and _is_linear(node):
                self._on_product(node, *(tensor.detach() for tensor in (*arguments, result) if tensor is not None))
            for read in node.inputs:
                if read is not None and last[read] == at:
                    values.pop(read, None)
        return made

    def _results(self, node: ir.Node, arguments: list[Tensor | None]) -> tuple[Tensor, ...]:
        if not _is_linear(node) or not torch.is_grad_enabled():
            return evaluate_node(node, arguments)
        x, weight = arguments
        assert x is not None
        if not x.requires_grad:
            x.requires_grad_()  # a leaf here: everything before it is frozen
        return (_MeasuredLinear.apply(x, weight, node, self._on_gradient),)


class _MeasuredLinear(torch.autograd.Function):
    """Compute x·Wᵀ, and report the gradients on their way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, node: ir.Node, report: OnGradient) -> Tensor:
        ctx.weight, ctx.node, ctx.report = weight, node, report
        return torch.nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:
        product = gradients[0] @ ctx.weight  # [..., in]
        ctx.report(ctx.node, gradients[0], product, ctx.weight)
        return product, None, None, None


def segments(model: ir.Model) -> list[Segment]:
    """Cut the nodes before each block, after the last one, and before the last Linear of all."""
    nodes = [node for node in model.graph if node.op_type != "Constant"]
    numbers = [_block(node) for node in nodes]
    linears = [at for at, node in enumerate(nodes) if _is_linear(node)]
    cuts, seen = {0, linears[-1]} if linears else {0}, -1
    for at, number in enumerate(numbers):
        if number is not None and number > seen:
            seen = number
            cuts.add(at)
    numbered = [at for at, number in enumerate(numbers) if number is not None]
    if numbered and numbered[-1] + 1 < len(nodes):
        cuts.add(numbered[-1] + 1)
    ends = [*sorted(cuts)[1:], len(nodes)]
    return [_segment(nodes[start:end]) for start, end in zip(sorted(cuts), ends, strict=True)]


def _segment(nodes: Sequence[ir.Node]) -> Segment:
    made = {output for node in nodes for output in node.outputs}
    reads = dict.fromkeys(
        value
        for node in nodes
        for value in node.inputs
        if value is not None and value not in made and not _is_constant(value)
    )
    return Segment(tuple(nodes), tuple(reads))


def _is_linear(node: ir.Node) -> bool:
    return (node.domain, node.op_type) == (DOMAIN, "Linear")


def _is_constant(value: ir.Value) -> bool:
    producer = value.producer()
    return value.const_value is not None or (producer is not None and producer.op_type == "Constant")


def _block(node: ir.Node) -> int | None:
    return next((int(part) for part in module_path(node).split(".") if part.isdigit()), None)


def _tracked(model: ir.Model) -> set[ir.Value]:
    """Find the values that gradients reach: inputs of linears, and what follows from them."""
    found: set[ir.Value] = set()
    for node in model.graph:
        if _is_linear(node) and node.inputs[0] is not None:
            found.add(node.inputs[0])
        if any(value in found for value in node.inputs):
            found.update(node.outputs)
    return found
