"""Choose the ring, and for every linear on the worker the bytes that travel, from the precision asked for.

    QuantizedLinear(x, Q, s) @worker  →  the same with upload_limbs, reply_bytes and crest for each direction
    model                              →  metadata: ring_dim, rank

Precision is counted in *effective bits*: log2 of the rms of the exact product over the standard deviation of its noise. With
input bound X (no overflow, whatever comes), crest factor c of the encoded tokens, and rows of Euclidean norm ‖W_i‖:

    rms(W_i·x) ≈ ‖W_i‖·X/c      std(noise) = LinearParameters.noise_std(‖W_i‖)

(the first for inputs that are uncorrelated with the row, which is where precision is scarcest). The cheapest pair of byte
counts that reaches the bits asked for is taken; the crest comes from calibration.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from hecompile.errors import HecompileError, InputError
from hecompile.he.parameters import CATALOGUE, LinearParameters, RingParameters
from hecompile.ir import GRADIENT_RANGE, PLACEMENT, RANGE, constant_of, module_path, nodes_of_type
from hecompile.plan import DIRECTIONS, effective_bits

RING_DIM, RANK = "hecompile.ring_dim", "hecompile.rank"
_SIMILAR_COST = 1.15  # sets whose costs differ by less count as equal; then the one with more security bits wins
_FALLBACK_CREST = 16.0  # a value that calibration did not see (its gradient was zero)


@dataclass(frozen=True)
class SelectParameters(ir.passes.InPlacePass):
    """`effective_bits`: precision wanted of every product. `tokens`: tokens per step the ring is sized for.

    `ring` fixes the ring instead. Raises InputError when no byte counts reach the precision, with the numbers.
    """

    effective_bits: float = 8.0
    tokens: int = 512
    ring: RingParameters | None = None

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        ring = self.chosen_ring()
        chosen = {RING_DIM: str(ring.ring_dim), RANK: str(ring.rank)}
        modified = any(model.metadata_props.get(key) != value for key, value in chosen.items())
        model.metadata_props.update(chosen)
        for node in nodes_of_type(model, "QuantizedLinear"):
            if node.metadata_props.get(PLACEMENT) != "worker":
                continue
            for attribute in (part for direction in DIRECTIONS for part in self._attributes(node, direction)):
                before = node.attributes.get(attribute.name)
                modified |= before is None or before.value != attribute.value
                node.attributes[attribute.name] = attribute
        return ir.passes.PassResult(model, modified)

    def _attributes(self, node: ir.Node, direction: str) -> tuple[ir.Attr, ...]:
        parameters = self._cheapest(node, direction)
        return (
            ir.AttrInt64(f"{direction}_upload_limbs", parameters.upload_limbs),
            ir.AttrInt64(f"{direction}_reply_bytes", parameters.reply_bytes),
            ir.AttrFloat32(f"{direction}_crest", _crest(node, direction)),
        )

    def chosen_ring(self) -> RingParameters:
        """The ring asked for, or the catalogue's best for the number of tokens."""
        return self.ring or choose_ring(self.tokens)

    def _cheapest(self, node: ir.Node, direction: str) -> LinearParameters:
        weight = constant_of(node.inputs[1])
        assert weight is not None
        matrix = torch.from_numpy(np.ascontiguousarray(weight if direction == "forward" else weight.T))
        crest = _crest(node, direction)
        best, best_bits = None, -math.inf
        for limbs, reply in sorted(_byte_counts(), key=lambda pair: _bytes_per_token(matrix, *pair)):
            try:
                candidate = LinearParameters.from_weight(matrix, limbs, reply)
            except HecompileError:
                continue  # so few bytes that no input fits
            bits = effective_bits(candidate, matrix, crest)
            if bits >= self.effective_bits:
                return candidate
            if bits > best_bits:
                best, best_bits = candidate, bits
        raise InputError(
            f"{module_path(node)}, {direction}: {self.effective_bits} effective bits cannot be reached; "
            f"the best is {best_bits:.1f} with {best.upload_limbs if best else 4} bytes up. "
            "Ask for a lower precision, or for fewer weight bits"
        )


def choose_ring(tokens: int) -> RingParameters:
    """The catalogue's set with the least client work for `tokens` tokens; among similar ones the most secure.

    Work per feature: each block of ring_dim coefficients costs one FFT, ∝ d·log2 d, and rank products, ∝ d·rank.
    """
    if tokens < 1:
        raise InputError(f"the number of tokens per step must be positive, got {tokens}")

    def work(ring: RingParameters) -> float:
        blocks = math.ceil(tokens / ring.ring_dim)
        return blocks * ring.ring_dim * (math.log2(ring.ring_dim) + 2 * ring.rank)

    least = min(work(ring) for ring in CATALOGUE.values())
    similar = [ring for ring in CATALOGUE.values() if work(ring) <= _SIMILAR_COST * least]
    return max(similar, key=lambda ring: (ring.security_bits, -work(ring)))


def _byte_counts() -> list[tuple[int, int]]:
    return [(limbs, reply) for limbs in (1, 2, 3, 4) for reply in range(1, limbs + 1)]


def _bytes_per_token(matrix: torch.Tensor, limbs: int, reply: int) -> int:
    return limbs * matrix.shape[1] + reply * matrix.shape[0]


def _crest(node: ir.Node, direction: str) -> float:
    if direction == "forward":
        value = node.inputs[0]
        raw = value.metadata_props.get(RANGE) if value is not None else None
        return json.loads(raw)["crest"] if raw else _FALLBACK_CREST
    # A stacked gradient is as uneven as its most uneven part.
    outputs = [node.outputs[0]] + [o for consumer in node.outputs[0].consumers() for o in consumer.outputs]
    crests = [
        json.loads(o.metadata_props[GRADIENT_RANGE])["crest"] for o in outputs if GRADIENT_RANGE in o.metadata_props
    ]
    return max(crests, default=_FALLBACK_CREST)
