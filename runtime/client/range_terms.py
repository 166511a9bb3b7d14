"""The range loss of private training: it keeps what goes into a plan's polynomials within their domains.

LoRA changes what goes into the polynomials, and outside its domain a polynomial grows without limit. The client sees every
value in the clear, so that it can do what conversion does:

    Loss = α·L_range + β·L_var + L                       (Zimerman et al., Power-Softmax, arXiv 2410.09457)

with the terms of `hecompile.runtime.conversion.ranges`, here node by node, for the domain that each node has. They are
zero while values keep a tenth of their domain's size away from its ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import onnx_ir as ir
import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput

from hecompile.graph.attention_cache import causal_mask
from hecompile.graph.ir import ATTENTION_OPERATORS, attributes_of
from hecompile.graph.polynomial_operators import attention_scores, gaussian_exponents, power_weights
from hecompile.polynomial.range_penalty import beyond, outside
from hecompile.polynomial.ranges import ACTIVATIONS, NORMS

INNER = 0.9
"""Where the loss begins, of a domain."""


class RangeLossWatch:
    """The polynomial nodes of a graph that runs sequences packed. Immutable: `start` makes what one run writes to."""

    def __init__(self, model: ir.Model) -> None:
        watched = (*ATTENTION_OPERATORS, *NORMS, *ACTIVATIONS)
        self.nodes = {
            node.outputs[0]: node for node in model.graph if node.op_type in watched and "error_bound" in node.attributes
        }
        self.needed = {
            value
            for node in self.nodes.values()
            for value in node.inputs[: 2 if node.op_type in ATTENTION_OPERATORS else 1]
            if value is not None
        }

    def start(self, sequences: tuple[int, ...]) -> RangeTerms:
        """For one run of packed sequences of these lengths."""
        return RangeTerms(self, sequences)


class RangeTerms:
    """The terms of one forward run: scalars with a graph. Give `observe` to the interpreter."""

    def __init__(self, watch: RangeLossWatch, sequences: tuple[int, ...]) -> None:
        self._watch, self._sequences = watch, sequences
        self._values: dict[ir.Value, Tensor] = {}
        self.range_term, self.variance_term = torch.zeros(()), torch.zeros(())

    def loss(self, alpha: float, beta: float) -> Tensor:
        """α·L_range + β·L_var."""
        return alpha * self.range_term + beta * self.variance_term

    def observe(self, value: ir.Value, result: Tensor) -> None:
        """An observer of `hecompile.graph.interpreter.Interpreter.run`."""
        if value in self._watch.needed:
            self._values[value] = result
        node = self._watch.nodes.get(value)
        if node is None:
            return
        given = attributes_of(node)
        inputs = [self._values[used] for used in node.inputs if used is not None and used in self._watch.needed]
        if node.op_type in NORMS:
            variance = inputs[0].pow(2).mean(-1) + float(given["epsilon"])
            lower, upper = float(given["domain_lower"]), float(given["domain_upper"])
            self.variance_term = self.variance_term + outside(variance, lower / INNER, upper * INNER)
        elif node.op_type in ACTIVATIONS:
            bound = float(given["domain_upper"])
            self._add(beyond(inputs[0].abs().amax(-1), INNER * bound))
        else:
            query, key = inputs[0], inputs[-1]  # the same value where a model shares them
            for q, k in zip(*(part.split(self._sequences, dim=2) for part in (query, key)), strict=True):
                self._attention(node, given, q, k)

    def _attention(self, node: ir.Node, given: dict[str, object], q: Tensor, k: Tensor) -> None:
        """q and k [1, heads, L, D] of one sequence, which counts by its share of the positions."""
        numbers = {name: float(value) for name, value in given.items() if isinstance(value, (int, float))}
        mask, share = causal_mask(q.shape[2], k.shape[2]).to(q), q.shape[2] / sum(self._sequences)
        if node.op_type == "GaussianAttention":
            exponents = gaussian_exponents(q, k, numbers["scale"]).clamp_max(0.0)  # rounding may leave it a little above
            lower = numbers["domain_lower"]
            self._add(share * beyond((-exponents * mask).amax(-1), -INNER * lower))
            return
        scores = attention_scores(q, k, numbers["scale"])
        if node.op_type == "ChebyshevAttention":
            lower, upper = numbers["domain_lower"], numbers["domain_upper"]
            centred, radius = scores - numbers["shift"] - (lower + upper) / 2, (upper - lower) / 2
            self._add(share * beyond((centred * mask).abs().amax(-1), INNER * radius))
            return
        bound = numbers["domain_upper"]
        self._add(share * beyond((scores * mask).abs().amax(-1), INNER * bound))
        if given["division"] == "goldschmidt":
            _, divisor, _ = power_weights(scores, mask, given)
            lower, upper = numbers["ratio_lower"], numbers["ratio_upper"]
            # The lower end is ε or near it, which a query whose scores are all zero has: nothing to keep away from.
            self._add(share * outside(divisor, lower, upper * INNER))

    def _add(self, term: Tensor) -> None:
        self.range_term = self.range_term + term


@dataclass
class WatchedOutput(CausalLMOutput):
    """ranges: the terms of the run; None where they were not asked for."""

    ranges: RangeTerms | None = None


@runtime_checkable
class RangeLossModel(Protocol):
    """An `AdapterModel` whose output has `ranges` where `with_range_terms` is set and labels are given."""

    with_range_terms: bool
