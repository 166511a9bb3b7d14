"""Quantise the frozen weights of the decoder's Linear nodes to integers, one scale per output channel.

    Linear(x, W)  →  QuantizedLinear(x, Q, s),   Q = round(W / s) in [-Qmax, Qmax],   s_i = max_j |W_ij| / Qmax,
                        Qmax = 2^(bits-1) - 1; int8 for 8 bits, int16 above

Where calibration kept samples of x, each column's error is taken up by the columns after it, so that x·Wᵀ changes least
(GPTQ, `hecompile.approximation.error_feedback`); elsewhere every element is rounded to nearest, |W - Q·s| ≤ s/2.

The one integer matrix serves both directions: forward y = (x·Qᵀ) ⊙ s, backward dx = (dy ⊙ s)·Q, the scales being applied
by the client. Symmetric, weights only (activations are encoded per token at run time, with negligible loss): the form that
converges in Frery et al., arXiv 2505.07329, table 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from hecompile.approximation.error_feedback import ErrorFeedback
from hecompile.errors import InputError
from hecompile.graph.ir import (
    DOMAIN,
    ORIGIN,
    SAMPLES,
    add_initializer,
    constant_of,
    in_block,
    module_path,
    nodes_of_type,
    remove_unused,
    replace_node,
)
from hecompile.graph.ir import WEIGHT_BITS as CHOSEN_BITS
from hecompile.graph.lazy import Keep, add_constant, in_memory

WEIGHT_BITS = (8, 9, 10, 11, 12)
"""Up to 8 bits are one byte a weight on the worker; up to 12 are two, and the worker has up to twice the work."""

_ROWS = 2**15
"""Rows of a matrix that are quantised at a time."""


@dataclass(frozen=True)
class Quantize(ir.passes.InPlacePass):
    """Quantise every Linear inside the decoder layers, and the output head where `include_head` is set.

    bits: of the linears that none are chosen for (`hecompile.graph.ir.WEIGHT_BITS`). keep: where the integers go.
    Samples are let go of, those of each input when the linears that read it are done.
    Raises InputError when a weight is not finite, or `bits` is not one of WEIGHT_BITS.
    """

    bits: int = 8
    include_head: bool = False
    keep: Keep = in_memory

    def __post_init__(self) -> None:
        if self.bits not in WEIGHT_BITS:
            raise InputError(f"weights can have {', '.join(map(str, WEIGHT_BITS))} bits, got {self.bits}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        readers: dict[ir.Value | None, list[ir.Node]] = {}
        for node in nodes_of_type(model, "Linear"):
            if in_block(node) or self.include_head:
                readers.setdefault(node.inputs[0], []).append(node)
        for x, nodes in readers.items():
            samples = None if x is None else x.meta.pop(SAMPLES, None)
            feedback = None if samples is None else ErrorFeedback(samples)
            del samples
            for node in nodes:
                self._quantize(model.graph, node, feedback)
        _forget_samples(model)
        remove_unused(model)
        return ir.passes.PassResult(model, bool(readers))

    def _quantize(self, graph: ir.Graph, node: ir.Node, feedback: ErrorFeedback | None) -> None:
        path, frozen = module_path(node), node.inputs[1]
        weight = constant_of(frozen)
        assert weight is not None
        if not np.isfinite(weight).all():
            raise InputError(f"the weight of {path} holds values that are not finite; the checkpoint is damaged")
        bits = int(node.metadata_props.get(CHOSEN_BITS, self.bits))
        quantized, scale = quantize_weight(weight, bits, feedback)
        name = f"{path}.weight_{quantized.dtype}"
        inputs = [
            node.inputs[0],
            add_constant(graph, name, self.keep(name, quantized)),
            add_initializer(graph, f"{path}.weight_scale", scale),
        ]
        new = ir.node("QuantizedLinear", inputs, domain=DOMAIN, metadata_props={ORIGIN: path})
        replace_node(node, [new], new.outputs)
        if frozen is not None and frozen.name is not None and not frozen.uses():
            # At once, and the array too, for values outlive their graph in reference cycles: all float weights beside all
            # integer ones would take too much memory.
            del graph.initializers[frozen.name]
            frozen.const_value = None

    def ensures(self, model: ir.Model) -> None:
        for node in nodes_of_type(model, "QuantizedLinear"):
            weight = node.inputs[1]
            if weight is None or weight.dtype not in (ir.DataType.INT8, ir.DataType.INT16):
                raise ir.passes.PostconditionError(f"the weight of {module_path(node)} is not int8 or int16")


def quantize_weight(
    weight: np.ndarray, bits: int = 8, feedback: ErrorFeedback | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Quantise f32 [out, in] to (int8 or int16 [out, in] in [-Qmax, Qmax], f32 scale [out]).

    feedback: of what the matrix is multiplied with; None for rounding to nearest.

    A row of zeros gets scale 0, and so does one whose scale would be subnormal: its quotients could leave the range.
    """
    if len(weight) > _ROWS:  # a head, of which float copies would take gigabytes
        pieces = [quantize_weight(weight[at : at + _ROWS], bits, feedback) for at in range(0, len(weight), _ROWS)]
        return np.concatenate([part for part, _ in pieces]), np.concatenate([scale for _, scale in pieces])
    largest = 2 ** (bits - 1) - 1
    scale = np.abs(weight).max(axis=1) / largest  # [out]
    scale = np.where(scale < np.finfo(np.float32).tiny, 0.0, scale)
    safe = np.where(scale > 0, scale, 1.0)
    steps = np.where(scale[:, None] > 0, weight / safe[:, None], 0)  # [out, in]
    quantized = np.rint(steps) if feedback is None else feedback.round(torch.from_numpy(steps), largest).numpy()
    return quantized.astype(np.int8 if bits <= 8 else np.int16), scale.astype(np.float32)


def _forget_samples(model: ir.Model) -> None:
    for node in model.graph:
        for value in (*node.inputs, *node.outputs):
            if value is not None:
                value.meta.pop(SAMPLES, None)
