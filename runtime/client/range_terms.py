"""Keep the inputs of a plan's polynomials within their domains while its adapter trains.

LoRA changes what goes into the polynomials, and outside its domain a polynomial grows without limit. The client sees every
value in the clear, so that it can add a range loss as conversion does (`hecompile.polynomial.range_penalty`), here node by
node for the domain that each node has. Its terms are zero while values keep a tenth of their domain's size from its ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import onnx_ir as ir
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput

from hecompile.graph.interpreter import Observer
from hecompile.graph.ir import attributes_of
from hecompile.polynomial.inputs import NORMS, AttentionInputs, NonlinearNodes, is_approximated
from hecompile.polynomial.range_penalty import RangeTerms

INNER = 0.9
"""The part of a domain in which there is no loss."""


class RangeLoss:
    """Find the polynomials of a graph that runs sequences packed. Immutable: `start` measures one run."""

    def __init__(self, model: ir.Model) -> None:
        self._nodes = NonlinearNodes(model, is_approximated)

    def __bool__(self) -> bool:
        return bool(self._nodes)

    def start(self, lengths: tuple[int, ...]) -> tuple[RangeTerms, Observer]:
        """Return the terms of one run of packed sequences of these lengths, and the observer that adds to them."""
        terms = RangeTerms()

        def receive(node: ir.Node, inputs: AttentionInputs | Tensor) -> None:
            _add(terms, node, inputs)

        return terms, self._nodes.record(receive, lengths=lengths, gradients=True).observe


def _add(terms: RangeTerms, node: ir.Node, inputs: AttentionInputs | Tensor) -> None:
    attributes = attributes_of(node)
    if isinstance(inputs, AttentionInputs):
        _add_attention(terms, node.op_type, attributes, inputs)
    elif node.op_type in NORMS:
        terms.add_variances(inputs, attributes["domain_lower"] / INNER, attributes["domain_upper"] * INNER)
    else:
        terms.add_activations(inputs, INNER * attributes["domain_upper"])


def _add_attention(terms: RangeTerms, op_type: str, attributes: dict[str, Any], inputs: AttentionInputs) -> None:
    if op_type == "GaussianAttention":
        terms.add_exponents(inputs, -INNER * attributes["domain_lower"])
        return
    if op_type == "ChebyshevAttention":
        lower, upper = attributes["domain_lower"], attributes["domain_upper"]
        centred, radius = inputs.scores - attributes["shift"] - (lower + upper) / 2, (upper - lower) / 2
        terms.add_scores(inputs, centred, INNER * radius)
        return
    terms.add_scores(inputs, inputs.scores, INNER * attributes["domain_upper"])
    if attributes["division"] == "goldschmidt":
        # The lower end is ε or near it, which a query whose scores are all zero has: nothing to keep away from.
        terms.add_divisors(inputs, inputs.divisors(attributes), attributes["ratio_lower"], attributes["ratio_upper"] * INNER)


@dataclass
class WatchedOutput(CausalLMOutput):
    """Hold a model's output with the range terms of its run; `ranges` is None where they were not asked for."""

    ranges: RangeTerms | None = None


@runtime_checkable
class RangeLossModel(Protocol):
    """Require an `AdapterModel` whose output has `ranges` where `with_range_terms` is set and labels are given."""

    with_range_terms: bool
