"""The rule by which multiplicative depth is counted, and what a graph of sums and products needs of the scheme.

    Mul, MatMul of two computed values   deepest operand + 1   (ciphertext × ciphertext)
    Mul by a constant, Linear             operand + 1            (ciphertext × plaintext)
    Mul by zeros and plus or minus ones   operand                (entries are dropped or negated)
    Add, Sub, Neg, ReduceSum, moves       deepest operand
    Refresh                               0

With sequences in the slots every entry of a tensor is a ciphertext of its own, so that a mask drops entries instead of
multiplying; an engine that packs otherwise counts masks as products (`masks_are_free=False`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from hecompile.ckks.parameters import MAX_SCALE_BITS, modulus_bits
from hecompile.errors import LegalityError
from hecompile.graph.ir import DOMAIN, constant_of


def product_kind(node: ir.Node) -> str | None:
    """"ciphertext" or "plaintext" of a product by a computed value or a constant, "mask" for one by 0 and ±1, None else."""
    if node.domain == DOMAIN:
        return "plaintext" if node.op_type == "Linear" else None
    if node.op_type not in ("Mul", "MatMul"):
        return None
    constants = [array for array in map(constant_of, node.inputs) if array is not None]
    if not constants:
        return "ciphertext"
    if node.op_type == "Mul" and np.isin(constants[0], (-1.0, 0.0, 1.0)).all():
        return "mask"
    return "plaintext"


def is_constant(value: ir.Value | None) -> bool:
    return value is None or constant_of(value) is not None


def levels(model: ir.Model, masks_are_free: bool = True) -> dict[ir.Value, int]:
    """Multiplicative depth of every value that depends on an input. Inputs have none."""
    found: dict[ir.Value, int] = dict.fromkeys(model.graph.inputs, 0)
    for node in model.graph:
        operands = [found[value] for value in node.inputs if value is not None and value in found]
        if not operands:
            continue
        depth = 0 if node.op_type == "Refresh" else max(operands) + cost_of(node, masks_are_free)
        found.update(dict.fromkeys(node.outputs, depth))
    return found


def cost_of(node: ir.Node, masks_are_free: bool = True) -> int:
    """Levels that a node uses: 0 or 1."""
    kind = product_kind(node)
    return int(kind in ("ciphertext", "plaintext") or (kind == "mask" and not masks_are_free))


def elements(value: ir.Value) -> int:
    """Numbers in a tensor per entry of the batch. LegalityError where the shape is not static but for the batch."""
    if value.shape is None or any(not isinstance(dim, int) for dim in value.shape[1:]):
        raise LegalityError(f"the shape of {value.name} is not known; run expand_polynomials first")
    return math.prod(dim for dim in value.shape if isinstance(dim, int))


@dataclass(frozen=True)
class Demand:
    """What a graph asks of the scheme. `depth`: the most levels between two refreshes, or of the graph; products of two
    numbers and refreshed numbers, both per entry of the batch."""

    depth: int
    ciphertext_products: int
    plaintext_products: int
    refreshes: int

    def modulus_bits(self, bits_per_level: int = MAX_SCALE_BITS) -> int:
        """log2 of the whole modulus of CKKS parameters with this depth (`hecompile.ckks.parameters.modulus_bits`)."""
        return modulus_bits(self.depth, bits_per_level)


def demand(model: ir.Model, masks_are_free: bool = True) -> Demand:
    """Count over a graph at stage `polynomial`, refreshed or not."""
    found = levels(model, masks_are_free)
    products = {"ciphertext": 0, "plaintext": 0}
    refreshes = 0
    for node in model.graph:
        if node.outputs[0] not in found:
            continue
        if node.op_type == "Refresh":
            refreshes += elements(node.outputs[0])
        kind = product_kind(node)
        if kind in products:
            products[kind] += multiplications(node)
    return Demand(max(found.values(), default=0), products["ciphertext"], products["plaintext"], refreshes)


def multiplications(node: ir.Node) -> int:
    """Products of two numbers that a Mul, MatMul or Linear takes per entry of the batch; masked entries count."""
    inner = 1
    if node.op_type in ("MatMul", "Linear"):
        first = node.inputs[0]
        assert first is not None and first.shape is not None
        inner = int(first.shape[-1])  # type: ignore[arg-type]
    return elements(node.outputs[0]) * inner
