"""Count the multiplicative depth of a graph of sums and products, and what follows from it.

    value  →  its level in its metadata
    graph  →  depth, modulus bits and products in the model's metadata

The rule is in `hecompile.polynomial.depth`. A leveled scheme rescales by one prime of `bits_per_level` bits per
product, so that its modulus needs the primes that stay at the end, one for each level and the key-switching prime
(Cheon et al., Asiacrypt 2017; the security standard, homomorphicencryption.org 2018, bounds its bits by the ring
dimension). `hecompile.ckks.parameters.modulus_bits` gives their number and sizes. The pass only records; no value changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from hecompile.ckks.parameters import MAX_SCALE_BITS, MIN_SCALE_BITS
from hecompile.errors import InputError
from hecompile.graph.ir import LEVEL
from hecompile.polynomial.depth import circuit_cost, levels

METADATA = "hecompile.depth"


@dataclass(frozen=True)
class Depth(ir.passes.InPlacePass):
    """Write levels, depth and what follows from them into metadata.

    bits_per_level: of a rescaling prime. masks_are_free: whether the engine drops masked entries instead of multiplying.
    Raises InputError for bits that no CKKS parameters have.
    """

    bits_per_level: int = MAX_SCALE_BITS
    masks_are_free: bool = True

    def __post_init__(self) -> None:
        if not MIN_SCALE_BITS <= self.bits_per_level <= MAX_SCALE_BITS:
            raise InputError(
                f"bits per level must be {MIN_SCALE_BITS} to {MAX_SCALE_BITS}, got {self.bits_per_level}"
            )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for value, level in levels(model, self.masks_are_free).items():
            value.metadata_props[LEVEL] = str(level)
        cost = circuit_cost(model, self.masks_are_free)
        model.metadata_props.update(
            {
                METADATA: str(cost.depth),
                f"{METADATA}.modulus_bits": str(cost.modulus_bits(self.bits_per_level)),
                f"{METADATA}.ciphertext_products": str(cost.ciphertext_products),
                f"{METADATA}.plaintext_products": str(cost.plaintext_products),
                f"{METADATA}.refreshes": str(cost.refreshes),
            }
        )
        return ir.passes.PassResult(model, True)
