"""Range loss, and the ranges that it works on.

    Loss = α·L_range + β·L_var + L                       (Zimerman et al., Power-Softmax, arXiv 2410.09457)

L_range is the sum over attentions and activations, L_var over norms, of the mean square by which what goes into a polynomial
leaves the range wanted: of |x|/bound - 1 for the largest |x| of a token (activations) or query (scores, exponents), of the
logarithm of the factor for divisors and variances, which are positive and spread over decades. Inside the range the terms
and their gradients are zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import onnx_ir as ir
import torch
from torch import Tensor

from hecompile.graph.interpreter import causal_attention_bias
from hecompile.graph.ir import attribute, nodes_of_type
from hecompile.graph.matching import attentions
from hecompile.graph.polynomial_operators import attention_scores, gaussian_exponents, power_weights
from hecompile.polynomial.range_penalty import beyond, outside
from hecompile.polynomial.ranges import ACTIVATIONS, NORMS, Interval
from hecompile.runtime.conversion.recipe import ConversionRecipe


@dataclass
class Measured:
    """What one run of the graph gave: the two terms of the loss (scalars), and the smallest and largest value by kind."""

    range_term: Tensor
    variance_term: Tensor
    seen: dict[str, Interval] = field(default_factory=dict)

    def widen(self, kind: str, values: Tensor) -> None:
        """Take `values` into the interval of `kind`."""
        now = Interval.of(values.detach())
        before = self.seen.get(kind)
        self.seen[kind] = now if before is None else Interval(min(now.lower, before.lower), max(now.upper, before.upper))


class RangeObserver:
    """Watches every attention, norm and activation of a graph. Give `observe` to the interpreter, then read `measured`.

    Kinds: scores or exponents, divisors, variances, activation_inputs. The divisors of a power attention are of the recipe's
    form, also where the graph trains with the stable one. A softmax attention, which no polynomial replaces, is not watched.
    """

    def __init__(self, model: ir.Model, recipe: ConversionRecipe) -> None:
        self._recipe = recipe
        self._attentions = {
            node.outputs[0]: (node, parts) for node, parts in attentions(model) if node.op_type != "MatMul"
        }
        self._norms = {n.outputs[0]: n for op in NORMS for n in nodes_of_type(model, op)}
        self._activations = {n.outputs[0]: n for op in ACTIVATIONS for n in nodes_of_type(model, op)}
        readers = (*self._norms.values(), *self._activations.values())
        self._needed = {node.inputs[0] for node in readers} | {
            value for _, parts in self._attentions.values() for value in (parts.q, parts.k)
        }
        self.reset()

    def reset(self) -> None:
        """Forget the last run."""
        self._values: dict[ir.Value, Tensor] = {}
        self.measured = Measured(torch.zeros(()), torch.zeros(()))

    def observe(self, value: ir.Value, result: Tensor) -> None:
        """An observer of `hecompile.graph.interpreter.Interpreter.run`, for rows without padding."""
        if value in self._needed:
            self._values[value] = result
        if value in self._attentions:
            self._attention(*self._attentions[value])
        elif (norm := self._norms.get(value)) is not None:
            x = self._values[norm.inputs[0]]  # type: ignore[index]
            variance = x.pow(2).mean(-1) + float(attribute(norm, "epsilon"))  # type: ignore[arg-type]
            self.measured.widen("variances", variance)
            section = self._recipe.norm
            if section.form == "polynomial":
                self.measured.variance_term = self.measured.variance_term + outside(variance, section.lower, section.upper)
        elif (activation := self._activations.get(value)) is not None:
            x = self._values[activation.inputs[0]]  # type: ignore[index]
            self.measured.widen("activation_inputs", x)
            if self._recipe.activation.form != "silu":
                self._add(beyond(x.abs().amax(-1), self._recipe.activation.bound))

    def _attention(self, node: ir.Node, parts: object) -> None:
        q, k, scale = self._values[parts.q], self._values[parts.k], parts.scale  # type: ignore[attr-defined]
        length = q.shape[2]
        mask = torch.exp(causal_attention_bias(torch.ones(1, length, dtype=torch.int64)))  # [1, 1, S, S]
        section = self._recipe.attention
        if node.op_type == "GaussianAttention":
            exponents = gaussian_exponents(q, k, scale).clamp_max(0.0)  # rounding may leave it a little above zero
            seen = mask.expand_as(exponents) > 0
            self.measured.widen("exponents", exponents[seen])
            self._add(beyond((-exponents * mask).amax(-1), section.bound))
            return
        scores = attention_scores(q, k, scale)
        self.measured.widen("scores", scores[mask.expand_as(scores) > 0])
        attributes = {name: attribute(node, name) for name in ("power", "epsilon")} | {"form": section.form}
        _, divisor, _ = power_weights(scores, mask, attributes)
        self.measured.widen("divisors", divisor)
        self._add(beyond((scores * mask).abs().amax(-1), section.bound))
        self._add(outside(divisor, section.divisor_lower, section.divisor_upper))

    def _add(self, term: Tensor) -> None:
        self.measured.range_term = self.measured.range_term + term


Run = Callable[[Tensor, RangeObserver], Tensor]


def measure(run: Run, observer: RangeObserver, rows: Tensor, batch_size: int) -> dict[str, Interval]:
    """Ranges over all rows int64 [N, S]."""
    whole = Measured(torch.zeros(()), torch.zeros(()))
    with torch.no_grad():
        for batch in rows.split(batch_size):
            run(batch, observer)
            for kind, interval in observer.measured.seen.items():
                whole.widen(kind, torch.tensor([interval.lower, interval.upper]))
    return whole.seen
