"""Run the graph on sample tokens, forward and backward, and record what each Linear sees.

    Linear(x, W)  →  the same node; x and y carry {"max", "crest"} of activations, y also those of its gradient

`crest` is the root mean square, over tokens, of max|x| / rms(x) within a token: with per-token scaling it says how far
the rms of an encoded token lies below the largest integer, hence what precision a given noise leaves. `max` is the largest
magnitude and feeds the domains of polynomial approximations. How large products become in proportion to what is multiplied
(`PRODUCT_PEAK`, `GRADIENT_PEAK`) says how far tokens can be scaled before one overflows. The tokens need not be private: any
text of the model's language will do. Records only; the function of the graph is unchanged.

Attentions, RMSNorms and SiLUs, exact or approximated, get what a polynomial in their place must cover: scores, exponents and
divisors, variances, inputs (`hecompile.polynomial.ranges`). Where a polynomial stands already and its domain does not
cover what was seen, the pass refuses the graph.

With `keep_samples` the rows themselves stay in memory beside the values, for passes that round weights by them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from hecompile.errors import InputError
from hecompile.graph.interpreter import Interpreter, graph_inputs
from hecompile.graph.ir import (
    DOMAIN,
    GRADIENT_PEAK,
    GRADIENT_RANGE,
    GRADIENT_SAMPLES,
    PRODUCT_PEAK,
    RANGE,
    SAMPLES,
    constant_of,
    nodes_of_type,
)
from hecompile.plan.circuits import MOST_OUTPUTS, parts_of
from hecompile.polynomial.inputs import AttentionInputs, NonlinearNodes
from hecompile.polynomial.ranges import check_domain, range_of, write_range

Samples = tuple[tuple[int, ...], ...]
"""Token ids, one tuple per sequence."""


@dataclass(frozen=True)
class Calibrate(ir.passes.InPlacePass):
    """Record the ranges that a run on sample tokens sees.

    samples: sequences of one length, at least 2. keep_samples: keep what the linears read, and their gradients
    (`hecompile.graph.ir.SAMPLES`). Raises InputError for other samples; LegalityError where the domain of a polynomial does
    not cover what was seen.
    """

    samples: Samples
    keep_samples: bool = False

    def requires(self, model: ir.Model) -> None:
        if not self.samples or len({len(sample) for sample in self.samples}) != 1 or len(self.samples[0]) < 2:
            raise InputError("calibration needs one or more sequences of one length of at least 2 tokens")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        if not _linears(model):
            return ir.passes.PassResult(model, False)
        watched = {value for node in _linears(model) for value in (node.inputs[0], node.outputs[0])}
        input_ids = torch.tensor(self.samples, dtype=torch.int64)
        inputs = graph_inputs(input_ids, torch.ones_like(input_ids), model) | _adapter_at_zero(model)
        recorder = NonlinearNodes(model).record(_write_range, inputs)
        seen: dict[ir.Value, Tensor] = {}

        def observe(value: ir.Value, result: Tensor) -> None:
            recorder.observe(value, result)
            if value in watched:
                if not result.requires_grad:
                    result.requires_grad_()  # a leaf here: everything before it is frozen
                result.retain_grad()
                seen[value] = result

        with torch.enable_grad():
            logits = Interpreter(model).run(inputs, observer=observe)[str(model.graph.outputs[0].name)]
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()).backward()
        for value, tensor in seen.items():
            value.metadata_props[RANGE] = _summary(tensor.detach())
        for node in _linears(model):
            gradient = seen[node.outputs[0]].grad
            if gradient is not None:
                node.outputs[0].metadata_props[GRADIENT_RANGE] = _summary(gradient)
            if self.keep_samples:
                _keep(node, seen)
        _write_peaks(_linears(model), seen)
        for node in model.graph:
            check_domain(node)
        return ir.passes.PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        for node in _linears(model):
            if RANGE not in node.outputs[0].metadata_props:
                raise ir.passes.PostconditionError(f"{node.name} was not reached by calibration")


def _keep(node: ir.Node, seen: dict[ir.Value, Tensor]) -> None:
    x, y = node.inputs[0], node.outputs[0]
    assert x is not None
    x.meta[SAMPLES] = seen[x].detach().flatten(0, -2)  # [T, in]
    if (gradient := seen[y].grad) is not None:
        y.meta[GRADIENT_SAMPLES] = gradient.flatten(0, -2)  # [T, out]


def _write_peaks(nodes: list[ir.Node], seen: dict[ir.Value, Tensor]) -> None:
    """Write PRODUCT_PEAK of the results and GRADIENT_PEAK of what is read, of each where there is something but zeros.

    Linears that read one value send their gradients in one row, and get the sum of their products. One that is wider than a
    product can be sends each part of its gradient in a row of its own. Each counts in proportion to its own length: beside
    the one entry of a target, the gradients of all other words of a vocabulary are short, and point one way.
    """
    squares: dict[ir.Value, Tensor] = {}
    parts: dict[ir.Value, float] = {}
    for node in nodes:
        x, y, weight = node.inputs[0], node.outputs[0], constant_of(node.inputs[1])
        assert x is not None and weight is not None
        largest = torch.from_numpy(np.abs(weight).max(axis=1))  # [out]
        result, gradient = seen[y].detach(), seen[y].grad
        _write_peak(y, PRODUCT_PEAK, _peak(torch.where(largest > 0, result / largest, 0.0), _length(seen[x].detach())))
        if gradient is not None:
            squares[x] = squares.get(x, torch.zeros(())) + _length(gradient * largest).square()
            if len(weight) > MOST_OUTPUTS:
                parts[x] = max(parts.get(x, 0.0), _peak_of_parts(gradient, weight, largest))
    for x, square in squares.items():
        product = seen[x].grad
        if product is not None:
            _write_peak(x, GRADIENT_PEAK, max(_peak(product, square.sqrt()), parts.get(x, 0.0)))


def _peak_of_parts(gradient: Tensor, weight: np.ndarray, largest: Tensor) -> float:
    """Return the largest `_peak` of the parts that a wide linear is cut into, gradient [..., out], weight [out, in]."""
    peaks = []
    for rows in parts_of(len(weight)):
        part = gradient[..., rows]
        peaks.append(_peak(part @ torch.tensor(weight[rows], dtype=part.dtype), _length(part * largest[rows])))
    return max(peaks)


def _peak(product: Tensor, length: Tensor) -> float:
    """Return the largest |product| [..., n] in proportion to `length` [T], of tokens whose length is not zero; else 0."""
    largest = product.flatten(0, -2).abs().amax(dim=1).double()  # [T]
    live = (length > 0) & (largest > 0)
    return float((largest[live] / length[live]).max()) if bool(live.any()) else 0.0


def _write_peak(value: ir.Value, key: str, peak: float) -> None:
    if peak > 0:
        value.metadata_props[key] = f"{peak:.4g}"


def _length(rows: Tensor) -> Tensor:
    """Return the Euclidean norm of every token of [..., features], float64 [T]."""
    return torch.linalg.vector_norm(rows.flatten(0, -2), dim=1, dtype=torch.float64)


def _write_range(node: ir.Node, inputs: AttentionInputs | Tensor) -> None:
    write_range(node.outputs[0], range_of(inputs))


def _linears(model: ir.Model) -> list[ir.Node]:
    return list(nodes_of_type(model, "Linear", DOMAIN))


def _adapter_at_zero(model: ir.Model) -> dict[str, Tensor]:
    return {
        str(value.name): torch.zeros(value.shape.numpy())
        for value in model.graph.inputs
        if ".lora_" in str(value.name) and value.shape is not None
    }


def _summary(tensor: Tensor) -> str:
    """JSON of the largest magnitude and the crest factor over tokens; tokens that are all zero do not count."""
    rows = tensor.reshape(-1, tensor.shape[-1])  # [T, features]
    peak = rows.abs().amax(dim=1)  # [T]
    live = peak > 0
    if not bool(live.any()):
        return json.dumps({"max": 0.0, "crest": 1.0})
    crest = peak[live] / rows[live].pow(2).mean(dim=1).sqrt()  # [live tokens]
    return json.dumps({"max": float(f"{peak.max():.4g}"), "crest": float(f"{crest.pow(2).mean().sqrt():.4g}")})
