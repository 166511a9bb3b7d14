"""Measure ranges and range loss while a conversion trains.

The terms are those of `hecompile.polynomial.range_penalty`, for the ranges that the recipe wants: the domains are fixed
later, from the ranges that training has reached.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir
import torch
from torch import Tensor

from hecompile.graph.interpreter import Observer
from hecompile.graph.ir import attribute
from hecompile.polynomial.inputs import NORMS, AttentionInputs, NonlinearNodes
from hecompile.polynomial.names import EXACT
from hecompile.polynomial.range_penalty import RangeTerms
from hecompile.polynomial.ranges import Interval
from hecompile.runtime.conversion.recipe import ConversionRecipe


class Measured(RangeTerms):
    """Hold the terms of a run, and the range of each kind of value: scores or exponents, divisors, variances,
    activation_inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Interval] = {}

    def widen(self, kind: str, interval: Interval) -> None:
        """Take `interval` into the range of `kind`."""
        self.seen[kind] = interval.joined(self.seen[kind]) if kind in self.seen else interval


class RangeObserver:
    """Watch every attention, norm and activation of a graph: `start` a run, then read `measured`.

    The divisors of a power attention are of the recipe's form, also where the graph trains with the stable one. A softmax
    attention, which no polynomial replaces, is not watched.
    """

    def __init__(self, model: ir.Model, recipe: ConversionRecipe) -> None:
        self._recipe = recipe
        self._nodes = NonlinearNodes(model, lambda node: node.op_type != "MatMul")
        self.measured = Measured()

    def start(self, graph_inputs: Mapping[str, Tensor]) -> Observer:
        """Forget the last run, and return the interpreter's observer of the next one, which has these inputs."""
        self.measured = Measured()
        return self._nodes.record(self._receive, graph_inputs, gradients=True).observe

    def _receive(self, node: ir.Node, inputs: AttentionInputs | Tensor) -> None:
        if isinstance(inputs, AttentionInputs):
            self._attention(node, inputs)
        elif node.op_type in NORMS:
            self.measured.widen("variances", Interval.of(inputs))
            norm = self._recipe.norm
            if norm.form == "polynomial":
                self.measured.add_variances(inputs, norm.lower, norm.upper)
        else:
            self.measured.widen("activation_inputs", Interval.of(inputs))
            if self._recipe.activation.form != EXACT:
                self.measured.add_activations(inputs, self._recipe.activation.bound)

    def _attention(self, node: ir.Node, inputs: AttentionInputs) -> None:
        section = self._recipe.attention
        if node.op_type == "GaussianAttention":
            self.measured.widen("exponents", Interval.of(inputs.visible(inputs.exponents).clamp_max(0.0)))
            self.measured.add_exponents(inputs, section.bound)
            return
        self.measured.widen("scores", Interval.of(inputs.visible(inputs.scores)))
        attributes = {name: attribute(node, name) for name in ("power", "epsilon")} | {"form": section.form}
        divisors = inputs.divisors(attributes)
        self.measured.widen("divisors", Interval.of(divisors))
        self.measured.add_scores(inputs, inputs.scores, section.bound)
        self.measured.add_divisors(inputs, divisors, section.divisor_lower, section.divisor_upper)


Run = Callable[[Tensor, RangeObserver], Tensor]
"""Run a graph on tokens [B, S] under an observer."""


def measure(run: Run, observer: RangeObserver, rows: Tensor, batch_size: int) -> dict[str, Interval]:
    """Return the ranges by kind over all rows int64 [N, S]."""
    whole = Measured()
    with torch.no_grad():
        for batch in rows.split(batch_size):
            run(batch, observer)
            for kind, interval in observer.measured.seen.items():
                whole.widen(kind, interval)
    return whole.seen
