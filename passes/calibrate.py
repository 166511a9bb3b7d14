"""Run the graph on sample tokens, forward and backward, and record what each Linear sees.

    Linear(x, W)  →  the same node; x and y carry {"max", "crest"} of activations, y also those of its gradient

`crest` is the root mean square, over tokens, of max|x| / rms(x) within a token: with per-token scaling it says how far
the rms of an encoded token lies below the largest integer, hence what precision a given noise leaves. `max` is the largest
magnitude and feeds the domains of polynomial approximations. The tokens need not be private: any text of the model's
language will do. Records only; the function of the graph is unchanged.

Attentions, RMSNorms and SiLUs, exact or approximated, get what a polynomial in their place must cover: scores, exponents and
divisors, variances, inputs (`hecompile.approximation_ranges`). Where a polynomial stands already and its domain does not
cover what was seen, the pass refuses the graph.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from hecompile.approximation_ranges import ACTIVATIONS, NORMS, AttentionRange, Interval, check_domain, write_range
from hecompile.errors import InputError
from hecompile.interpreter import Interpreter, graph_inputs
from hecompile.ir import DOMAIN, GRADIENT_RANGE, RANGE, attribute, nodes_of_type
from hecompile.matching import AttentionParts, attentions


@dataclass(frozen=True)
class Calibrate(ir.passes.InPlacePass):
    """Records ranges. `samples`: token ids, one tuple per sequence, of equal lengths ≥ 2."""

    samples: tuple[tuple[int, ...], ...]

    def requires(self, model: ir.Model) -> None:
        if not self.samples or len({len(sample) for sample in self.samples}) != 1 or len(self.samples[0]) < 2:
            raise InputError("calibration needs one or more sequences of one length of at least 2 tokens")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        if not _linears(model):
            return ir.passes.PassResult(model, False)
        watched = {value for node in _linears(model) for value in (node.inputs[0], node.outputs[0])}
        ranges = _ApproximationRanges(model)
        seen: dict[ir.Value, Tensor] = {}

        def observe(value: ir.Value, result: Tensor) -> None:
            ranges.observe(value, result)
            if value in watched:
                if not result.requires_grad:
                    result.requires_grad_()  # a leaf here: everything before it is frozen
                result.retain_grad()
                seen[value] = result

        with torch.enable_grad():
            input_ids = torch.tensor(self.samples, dtype=torch.int64)
            inputs = graph_inputs(input_ids, torch.ones_like(input_ids)) | _adapter_at_zero(model)
            for value in model.graph.inputs:
                ranges.observe(value, inputs[str(value.name)])
            logits = Interpreter(model).run(inputs, observer=observe)[str(model.graph.outputs[0].name)]
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()).backward()
        for value, tensor in seen.items():
            value.metadata_props[RANGE] = _summary(tensor.detach())
        for node in _linears(model):
            gradient = seen[node.outputs[0]].grad
            if gradient is not None:
                node.outputs[0].metadata_props[GRADIENT_RANGE] = _summary(gradient)
        for node in model.graph:
            check_domain(node)
        return ir.passes.PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        for node in _linears(model):
            if RANGE not in node.outputs[0].metadata_props:
                raise ir.passes.PostconditionError(f"{node.name} was not reached by calibration")


class _ApproximationRanges:
    """Hears every value of a run and records, on the results of attentions, norms and activations, what went in."""

    def __init__(self, model: ir.Model) -> None:
        self._attentions: dict[ir.Value, AttentionParts] = {node.outputs[0]: parts for node, parts in attentions(model)}
        self._others = {
            node.outputs[0]: node
            for op_type in (*NORMS, *ACTIVATIONS)
            for node in nodes_of_type(model, op_type)
            if node.inputs[0] is not None
        }
        needed = [value for parts in self._attentions.values() for value in (parts.q, parts.k, parts.bias)]
        self._needed = {*needed, *(node.inputs[0] for node in self._others.values())}
        self._seen: dict[ir.Value, Tensor] = {}

    def observe(self, value: ir.Value, result: Tensor) -> None:
        if value in self._needed:
            self._seen[value] = result.detach()
        if (parts := self._attentions.get(value)) is not None:
            q, k, bias = (self._seen[needed] for needed in (parts.q, parts.k, parts.bias))
            write_range(value, AttentionRange.measure(q, k, bias, parts.scale))
        elif (node := self._others.get(value)) is not None:
            x = self._seen[node.inputs[0]]  # type: ignore[index]
            if node.op_type in NORMS:
                x = x.pow(2).mean(-1) + attribute(node, "epsilon")  # type: ignore[operator]
            write_range(value, Interval.of(x))


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
