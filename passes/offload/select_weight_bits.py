"""Give two bytes to the weights whose rounding to one would move the gradients most, and one byte to all others.

    Linear(x, W)  →  the node with weight_bits 8, or up to 12

Rounding a row to multiples of its scale s_i adds noise of variance s_i²/12 to every element. In products with the rows x and
gradients g that calibration saw, relative to their size, it has the squares

    forward   ε² = Σ‖x‖²·Σ s_i²/12 / Σ‖x·Wᵀ‖²        backward   δ² = in·Σ g_i²·s_i²/12 / Σ‖g·W‖²

(Widrow and Kollár, Quantization Noise, 2008, chapter 4, for the variance). Errors of different linears are independent and
add up on their way through the model, so that the error that a model's gradients have grows with the sum. Linears that read
one value travel as one, and get the same bits; δ counts where that value needs a gradient. Those with the largest ε² + δ²
for each weight get two bytes, until what the others add up to is within `error_budget`. Two bytes hold 12 bits, but noise of
the encryption grows with the weights: where products of 12 bits would not reach the wanted effective bits, as for rows of
thousands of features, they get as many bits as do, or one byte.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from hecompile.errors import InputError, LegalityError
from hecompile.graph.gradients import without_gradient
from hecompile.graph.ir import (
    GRADIENT_RANGE,
    RANGE,
    WEIGHT_BITS,
    constant_of,
    in_block,
    module_path,
    nodes_of_type,
)
from hecompile.graph.recorded import MOMENTS
from hecompile.plan.circuits import MOST_OUTPUTS, largest_crest, reachable_bits

ONE_BYTE, TWO_BYTES = 8, 12
"""Bits of weights: of more than 8, 12 cost as much as 9 on the worker."""
_MARGIN = 0.1
"""Effective bits between the prediction here, for weights rounded to the nearest, and that for weights as they will be."""


@dataclass(frozen=True)
class SelectWeightBits(ir.passes.InPlacePass):
    """Choose bits for every Linear inside the decoder layers, and for the output head where `include_head` is set.

    error_budget: the sum of ε² + δ² that one-byte linears may have; 0 gives two bytes to all that have an error.
    effective_bits: that products must reach. Raises LegalityError where calibration kept no samples, InputError for a budget
    below 0.
    """

    error_budget: float = 5e-5
    include_head: bool = False
    effective_bits: float = 8.0

    def __post_init__(self) -> None:
        if not self.error_budget >= 0:
            raise InputError(f"error_budget must be a number of at least 0, got {self.error_budget}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        readers: dict[ir.Value | None, list[ir.Node]] = {}
        for node in nodes_of_type(model, "Linear"):
            if in_block(node) or self.include_head:
                readers.setdefault(node.inputs[0], []).append(node)
        forward_only = without_gradient(model, "Linear")
        errors = {x: sum(one_byte_error(n, n not in forward_only) for n in nodes) for x, nodes in readers.items()}
        sizes = {x: sum(_weights(node) for node in nodes) for x, nodes in readers.items()}
        left, modified = sum(errors.values()), False
        for x in sorted(readers, key=lambda value: -errors[value] / sizes[value]):
            bits = self._most_bits(readers[x], readers[x][0] not in forward_only) if left > self.error_budget else ONE_BYTE
            left -= errors[x] if bits > ONE_BYTE else 0.0
            for node in readers[x]:
                modified |= node.metadata_props.get(WEIGHT_BITS) != str(bits)
                node.metadata_props[WEIGHT_BITS] = str(bits)
        return ir.passes.PassResult(model, modified)

    def _most_bits(self, nodes: list[ir.Node], both: bool) -> int:
        """Return the most bits with which the products of linears that travel as one reach the effective bits.

        both: the backward product as well.
        """
        arrays = [array for node in nodes if (array := constant_of(node.inputs[1])) is not None]  # [out, in] each
        if len(arrays) == 1 and len(arrays[0]) > MOST_OUTPUTS:  # a head, which travels in parts
            whole = arrays[0]
            parts = [whole[at : at + MOST_OUTPUTS] for at in range(0, len(whole), MOST_OUTPUTS)]
        else:
            parts = [np.concatenate(arrays)]
        forward = largest_crest([nodes[0].inputs[0]], RANGE)
        backward = largest_crest([node.outputs[0] for node in nodes], GRADIENT_RANGE) if both else None
        return min(self._most_bits_of(weight, forward, backward) for weight in parts)

    def _most_bits_of(self, weight: np.ndarray, forward: float, backward: float | None) -> int:
        """Return the same for one product's weight f32 [out, in] and the crests of what it is multiplied with."""
        step = np.abs(weight).max(axis=1, keepdims=True)
        unit = weight / np.where(step > 0, step, 1.0)
        for bits in range(TWO_BYTES, ONE_BYTE, -1):
            integers = np.rint(unit * (2 ** (bits - 1) - 1)).astype(np.int16)
            if reachable_bits(integers, forward, backward) >= self.effective_bits + _MARGIN:
                return bits
        return ONE_BYTE


def one_byte_error(node: ir.Node, both: bool = True) -> float:
    """Predict ε² + δ² of a Linear with weights of one byte; ε² alone where `both` is false.

    δ² is 0 where no gradient reached it. Raises LegalityError where calibration kept no samples of it.
    """
    array, moments = constant_of(node.inputs[1]), node.outputs[0].meta.get(MOMENTS)
    if array is None or moments is None:
        raise LegalityError(f"{module_path(node)}: calibrate with keep_samples before bits are chosen")
    largest = torch.from_numpy(np.abs(array).max(axis=1)).double()
    variance = (largest / (2 ** (ONE_BYTE - 1) - 1)).square() / 12  # [out]
    error = _ratio(moments.inputs.sum() * variance.sum(), moments.outputs)
    if both and moments.gradients is not None and moments.products is not None:
        error += _ratio(array.shape[1] * (moments.gradients @ variance), float(moments.products.sum()))
    return error


def _ratio(noise: torch.Tensor, signal: float) -> float:
    return float(noise) / signal if signal > 0 else 0.0


def _weights(node: ir.Node) -> int:
    weight = node.inputs[1]
    return 0 if weight is None or weight.shape is None else int(np.prod(weight.shape.numpy()))
