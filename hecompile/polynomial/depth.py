"""Count the multiplicative depth, products and refreshes of a graph of sums and products.

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
    """Return what a node multiplies by.

    "ciphertext" for a computed value, "plaintext" for a constant, "mask" for a constant of zeros and ±1; None for a node
    that is no product.
    """
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


def levels(model: ir.Model, masks_are_free: bool = True) -> dict[ir.Value, int]:
    """Return the multiplicative depth of every value that depends on an input; that of inputs is 0."""
    depths: dict[ir.Value, int] = dict.fromkeys(model.graph.inputs, 0)
    for node in model.graph:
        operands = [depths[value] for value in node.inputs if value is not None and value in depths]
        if not operands:
            continue
        depth = 0 if node.op_type == "Refresh" else max(operands) + levels_used(node, masks_are_free)
        depths.update(dict.fromkeys(node.outputs, depth))
    return depths


def levels_used(node: ir.Node, masks_are_free: bool = True) -> int:
    """Return the levels that a node uses: 0 or 1."""
    kind = product_kind(node)
    return int(kind in ("ciphertext", "plaintext") or (kind == "mask" and not masks_are_free))


def elements(value: ir.Value) -> int:
    """Return how many numbers a tensor has per entry of the batch.

    Raises LegalityError where the shape is not static but for the batch.
    """
    if value.shape is None or any(not isinstance(dim, int) for dim in value.shape[1:]):
        raise LegalityError(f"the shape of {value.name} is not known; run expand_polynomials first")
    return math.prod(dim for dim in value.shape if isinstance(dim, int))


@dataclass(frozen=True)
class CircuitCost:
    """Count what a graph needs of the scheme; products of two numbers and refreshed numbers are per entry of the batch.

    Attributes:
        depth: the most levels between two refreshes, or of the graph where it has none.
    """

    depth: int
    ciphertext_products: int
    plaintext_products: int
    refreshes: int

    def modulus_bits(self, bits_per_level: int = MAX_SCALE_BITS) -> int:
        """Return log2 of the whole modulus of CKKS parameters with this depth (`hecompile.ckks.parameters.modulus_bits`)."""
        return modulus_bits(self.depth, bits_per_level)


def circuit_cost(model: ir.Model, masks_are_free: bool = True) -> CircuitCost:
    """Count the cost of a graph at stage `polynomial`, refreshed or not."""
    depths = levels(model, masks_are_free)
    products = {"ciphertext": 0, "plaintext": 0}
    refreshes = 0
    for node in model.graph:
        if node.outputs[0] not in depths:
            continue
        if node.op_type == "Refresh":
            refreshes += elements(node.outputs[0])
        kind = product_kind(node)
        if kind in products:
            products[kind] += multiplications(node)
    return CircuitCost(max(depths.values(), default=0), products["ciphertext"], products["plaintext"], refreshes)


def multiplications(node: ir.Node) -> int:
    """Return how many products of two numbers a Mul, MatMul or Linear takes per entry of the batch; masked entries count."""
    inner = 1
    if node.op_type in ("MatMul", "Linear"):
        first = node.inputs[0]
        assert first is not None and first.shape is not None
        inner = int(first.shape[-1])  # type: ignore[arg-type]
    return elements(node.outputs[0]) * inner
