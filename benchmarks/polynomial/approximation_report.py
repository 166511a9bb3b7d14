"""Measure the error of every approximation of a graph, on sample tokens and at the edges of its domain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from hecompile.approximation import exponential, goldschmidt
from hecompile.graph.interpreter import Interpreter, graph_inputs
from hecompile.graph.ir import ATTENTION_OPERATORS, DOMAIN, attributes_of, module_path
from hecompile.graph.operators import OPERATORS, Context
from hecompile.polynomial.inputs import ACTIVATIONS, NORMS


@dataclass(frozen=True)
class ApproximationError:
    """Hold the errors of one approximated node.

    They are absolute errors of a weight (Gaussian kernel), of the sum over keys of the errors of the weights (other
    attentions), relative errors of the root (RMSNorm), or absolute errors (SiLU).

    Attributes:
        where: the node's module.
        at_edge: the larger error of the domain's two ends.
        bound: the error bound of the node.
    """

    where: str
    operator: str
    domain: tuple[float, float]
    on_data: float
    at_edge: float
    bound: float


def approximation_report(
    model: ir.Model, samples: tuple[tuple[int, ...], ...], adapter: Mapping[str, Tensor] | None = None
) -> tuple[ApproximationError, ...]:
    """Return the errors of every approximated node, in graph order, of a graph before it is quantised.

    Args:
        samples: token ids, sequences of one length.
        adapter: the LoRA matrices, where the graph has such inputs.
    """
    nodes = [node for node in model.graph if node.domain == DOMAIN and "error_bound" in node.attributes]
    needed = {value for node in nodes for value in node.inputs}
    seen: dict[ir.Value, Tensor] = {}

    def observe(value: ir.Value, result: Tensor) -> None:
        if value in needed:
            seen[value] = result

    ids = torch.tensor(samples, dtype=torch.int64)
    inputs = graph_inputs(ids, torch.ones_like(ids)) | dict(adapter or {})
    interpreter = Interpreter(model)
    with torch.no_grad():
        interpreter.run(inputs, observer=observe)
        for value in model.graph.inputs:
            seen[value] = inputs[str(value.name)]
        for name, value in model.graph.initializers.items():
            seen[value] = interpreter.constants[name]
        return tuple(_row(node, [seen[value] for value in node.inputs if value is not None]) for node in nodes)


def _row(node: ir.Node, inputs: list[Tensor]) -> ApproximationError:
    attributes = attributes_of(node)
    if node.op_type in ATTENTION_OPERATORS:
        on_data, at_edge, domain = _attention(node.op_type, attributes, inputs)
    else:
        domain = (attributes["domain_lower"], attributes["domain_upper"])
        on_data = _elementwise_error(node.op_type, attributes, *inputs)
        edges = [_edge(node.op_type, attributes, edge) for edge in domain]
        at_edge = max(_elementwise_error(node.op_type, attributes, *operands) for operands in edges)
    return ApproximationError(module_path(node), node.op_type, domain, on_data, at_edge, float(attributes["error_bound"]))


def _elementwise_error(op_type: str, attributes: Mapping[str, Any], x: Tensor, weight: Tensor | None = None) -> float:
    """Compare with the exact function in float64."""
    x = x.double()
    if op_type in NORMS:
        ones = torch.ones(x.shape[-1], dtype=x.dtype)
        approximated = OPERATORS[DOMAIN, op_type](Context(), attributes, x, ones)
        exact = OPERATORS[DOMAIN, "RMSNorm"](Context(), attributes, x, ones)
        return float(((approximated - exact).norm(dim=-1) / exact.norm(dim=-1).clamp_min(1e-30)).max())
    assert op_type in ACTIVATIONS
    approximated = OPERATORS[DOMAIN, op_type](Context(), attributes, x)
    return float((approximated - OPERATORS[DOMAIN, "SiLU"](Context(), {}, x)).abs().max())


def _edge(op_type: str, attributes: Mapping[str, Any], edge: float) -> tuple[Tensor, ...]:
    """Return an operand at that end of the domain."""
    if op_type in NORMS:
        return (torch.full((1, 1), max(edge - attributes["epsilon"], 0.0), dtype=torch.float64).sqrt(),)
    return (torch.tensor([[edge]], dtype=torch.float64),)


def _attention(
    op_type: str, attributes: Mapping[str, Any], inputs: list[Tensor]
) -> tuple[float, float, tuple[float, float]]:
    """Return (error on data, error at the edge, domain)."""
    q, k, _, bias = (tensor.double() for tensor in inputs)
    v = torch.eye(q.shape[2], dtype=q.dtype).expand(*q.shape[:2], -1, -1)  # the result is then the weights

    def weights(name: str, attributes: Mapping[str, Any]) -> Tensor:
        result: Tensor = OPERATORS[DOMAIN, name](Context(), attributes, q, k, v, bias)
        return result

    approximated = weights(op_type, attributes)
    if op_type == "GaussianAttention":
        difference = (approximated - weights(op_type, {**attributes, "squarings": 0})).abs().max()
        lower = torch.tensor(attributes["domain_lower"], dtype=torch.float64)
        squarings = attributes["squarings"]
        edge = (exponential.by_squaring(lower, squarings) - torch.exp(lower)).abs() if squarings else 0.0
        return float(difference), float(edge), (attributes["domain_lower"], attributes["domain_upper"])
    if op_type == "PowerAttention":
        exact = weights(op_type, {**attributes, "division": "exact"})
        difference = (approximated - exact).abs().sum(-1).max()
        ratio = (attributes["ratio_lower"], attributes["ratio_upper"])
        edge = 0.0
        if attributes["division"] == "goldschmidt":
            ends = torch.tensor(ratio, dtype=torch.float64)
            edge = float((goldschmidt.inverse(ends, *ratio, attributes["iterations"]) * ends - 1).abs().max())
        return float(difference), edge, ratio
    exact = torch.softmax((q * attributes["scale"]) @ k.transpose(-1, -2) + bias, dim=-1)
    return float((approximated - exact).abs().sum(-1).max()), _chebyshev_edge(attributes), (attributes["domain_lower"], 0.0)


def _chebyshev_edge(attributes: Mapping[str, Any]) -> float:
    """Return the larger error of two queries: scores as far apart as the domain allows, and both at its lower end."""
    shift, lower = attributes["shift"], attributes["domain_lower"]
    worst = 0.0
    for scores in ((lower, 0.0), (lower, lower)):
        q = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        k = (torch.tensor(scores, dtype=torch.float64) + shift)[None, None, :, None] / attributes["scale"]
        v, bias = torch.eye(2, dtype=torch.float64)[None, None], torch.zeros(1, 1, 1, 2, dtype=torch.float64)
        weights = OPERATORS[DOMAIN, "ChebyshevAttention"](Context(), attributes, q, k, v, bias)
        exact = torch.softmax(torch.tensor(scores, dtype=torch.float64), dim=-1)
        worst = max(worst, float((weights - exact).abs().sum()))
    return worst
