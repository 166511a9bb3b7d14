"""The error of every approximation of a graph: on sample tokens, and at the edges of its domain, beside its bound."""

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
    """What an error is of: attention, of a weight (Gaussian kernel), of the sum over keys of a weight's error (others);
    RMSNorm, relative, of the root; SiLU, absolute. `edge`: the larger one of the domain's two ends. `bound`: the node's."""

    where: str
    operator: str
    domain: tuple[float, float]
    on_data: float
    at_edge: float
    bound: float


def approximation_report(
    model: ir.Model, samples: tuple[tuple[int, ...], ...], adapter: Mapping[str, Tensor] | None = None
) -> tuple[ApproximationError, ...]:
    """One row per approximated node, in graph order, of a graph before it is quantised. `samples`: token ids, sequences of
    one length; `adapter`: the LoRA matrices where the graph has such inputs."""
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
    given = attributes_of(node)
    if node.op_type in ATTENTION_OPERATORS:
        on_data, at_edge, domain = _attention(node.op_type, given, inputs)
    else:
        domain = (given["domain_lower"], given["domain_upper"])
        on_data = _elementwise_error(node.op_type, given, *inputs)
        at_edge = max(_elementwise_error(node.op_type, given, *_edge(node.op_type, given, edge)) for edge in domain)
    return ApproximationError(module_path(node), node.op_type, domain, on_data, at_edge, float(given["error_bound"]))


def _elementwise_error(op_type: str, given: Mapping[str, Any], x: Tensor, weight: Tensor | None = None) -> float:
    """Against the exact function in float64."""
    x = x.double()
    if op_type in NORMS:
        ones = torch.ones(x.shape[-1], dtype=x.dtype)
        approximated = OPERATORS[DOMAIN, op_type](Context(), given, x, ones)
        exact = OPERATORS[DOMAIN, "RMSNorm"](Context(), given, x, ones)
        return float(((approximated - exact).norm(dim=-1) / exact.norm(dim=-1).clamp_min(1e-30)).max())
    assert op_type in ACTIVATIONS
    approximated = OPERATORS[DOMAIN, op_type](Context(), given, x)
    return float((approximated - OPERATORS[DOMAIN, "SiLU"](Context(), {}, x)).abs().max())


def _edge(op_type: str, given: Mapping[str, Any], edge: float) -> tuple[Tensor, ...]:
    """An operand at that end of the domain."""
    if op_type in NORMS:
        return (torch.full((1, 1), max(edge - given["epsilon"], 0.0), dtype=torch.float64).sqrt(),)
    return (torch.tensor([[edge]], dtype=torch.float64),)


def _attention(
    op_type: str, given: Mapping[str, Any], inputs: list[Tensor]
) -> tuple[float, float, tuple[float, float]]:
    """(error on data, at the edge, domain)."""
    q, k, _, bias = (tensor.double() for tensor in inputs)
    v = torch.eye(q.shape[2], dtype=q.dtype).expand(*q.shape[:2], -1, -1)  # the result is then the weights

    def weights(name: str, attributes: Mapping[str, Any]) -> Tensor:
        result: Tensor = OPERATORS[DOMAIN, name](Context(), attributes, q, k, v, bias)
        return result

    approximated = weights(op_type, given)
    if op_type == "GaussianAttention":
        difference = (approximated - weights(op_type, {**given, "squarings": 0})).abs().max()
        lower = torch.tensor(given["domain_lower"], dtype=torch.float64)
        edge = (exponential.by_squaring(lower, given["squarings"]) - torch.exp(lower)).abs() if given["squarings"] else 0.0
        return float(difference), float(edge), (given["domain_lower"], given["domain_upper"])
    if op_type == "PowerAttention":
        exact = weights(op_type, {**given, "division": "exact"})
        difference = (approximated - exact).abs().sum(-1).max()
        ratio = (given["ratio_lower"], given["ratio_upper"])
        edge = 0.0
        if given["division"] == "goldschmidt":
            ends = torch.tensor(ratio, dtype=torch.float64)
            edge = float((goldschmidt.inverse(ends, *ratio, given["iterations"]) * ends - 1).abs().max())
        return float(difference), edge, ratio
    exact = torch.softmax((q * given["scale"]) @ k.transpose(-1, -2) + bias, dim=-1)
    return float((approximated - exact).abs().sum(-1).max()), _chebyshev_edge(given), (given["domain_lower"], 0.0)


def _chebyshev_edge(given: Mapping[str, Any]) -> float:
    """Of a query whose two scores are as far apart as the domain allows, and of one whose two are both at its lower end."""
    shift, lower = given["shift"], given["domain_lower"]
    worst = 0.0
    for scores in ((lower, 0.0), (lower, lower)):
        q = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        k = (torch.tensor(scores, dtype=torch.float64) + shift)[None, None, :, None] / given["scale"]
        v, bias = torch.eye(2, dtype=torch.float64)[None, None], torch.zeros(1, 1, 1, 2, dtype=torch.float64)
        found = OPERATORS[DOMAIN, "ChebyshevAttention"](Context(), given, q, k, v, bias)
        exact = torch.softmax(torch.tensor(scores, dtype=torch.float64), dim=-1)
        worst = max(worst, float((found - exact).abs().sum()))
    return worst
