"""Choose the cheapest ring, and the bytes that travel for every linear on the worker, for a wanted precision.

    QuantizedLinear(x, Q, s) @worker  →  the node with upload_limbs, reply_bytes and crest for each direction, the
                                          backward one where x needs a gradient
    model                              →  metadata: ring_dim, rank, packed

Precision is counted in *effective bits*: log2 of the rms of the exact product over the standard deviation of its noise. With
input bound X (no overflow, whatever comes), crest factor c of the encoded tokens, and rows of Euclidean norm ‖W_i‖:

    rms(W_i·x) ≈ ‖W_i‖·X/c      std(noise) = LinearParameters.noise_std(‖W_i‖)

(the first for inputs that are uncorrelated with the row, which is where precision is scarcest). With calibrated bounds X is
larger by a gain that calibration gives (`hecompile.plan.circuits.calibrated_gain`), unless bytes are so few that noise would
hide a product that wraps (`hecompile.he.wraps`); then these bytes have the proven bound. The modulus is q = 2^32 for
every linear; each rounds what travels to a modulus of its own, 2^(8·upload_limbs) up and 2^(8·reply_bytes) down.

Among the byte counts that reach the wanted bits, the pass takes those with the least time on wire and worker
(`hecompile.plan.costs`); the client's work does not depend on them. One ring serves the whole plan, that of the least client
work. A product's precision does not depend on it, and a ring per linear would save at most 1 % of that work (all shapes of
Llama-3.2-1B, 32 to 4096 tokens, default costs) for the price of several matrices A.

A stacked backward product has many inputs, and noise in proportion to its signal grows as their number: gate and up together
have 16384 at 1B size, and need 4 limbs for 8 bits. Uploading the two gradients apart would save a byte per input up and cost
a second reply: 57 kB per token instead of 70 kB where 3 limbs then suffice (to 6.5 bits); for 8 bits five parts would be
needed, and 70 kB. So they stay together, and only there the limbs grow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch

from hecompile.errors import HecompileError, InputError, LegalityError
from hecompile.graph.gradients import without_gradient
from hecompile.graph.ir import (
    GRADIENT_PEAK,
    GRADIENT_RANGE,
    PLACEMENT,
    PRODUCT_PEAK,
    RANGE,
    constant_of,
    module_path,
    nodes_of_type,
)
from hecompile.he.check_tolerances import can_be_verified
from hecompile.he.parameters import CATALOGUE, LinearParameters, RingParameters
from hecompile.he.security import AMPLE_BITS
from hecompile.he.weight_norms import WeightNorms, measure_norms
from hecompile.he.wraps import largest_factor
from hecompile.plan.circuits import DIRECTIONS, calibrated_gain, effective_bits, largest_crest
from hecompile.plan.costs import CostModel

RING_DIM, RANK, PACKED = "hecompile.ring_dim", "hecompile.rank", "hecompile.packed"
_SIMILAR_COST = 1.2  # sets whose costs differ by less count as equal
_BYTE_COUNTS = tuple((limbs, reply) for limbs in (1, 2, 3, 4) for reply in range(1, limbs + 1))


@dataclass(frozen=True)
class SelectParameters(ir.passes.InPlacePass):
    """Write ring and byte counts into the graph.

    effective_bits: precision wanted of every product. tokens: tokens per step that the ring is sized for. ring: fixes the
    ring instead. stored_hints: without them the worker's products for the hints count as well. Raises InputError when no
    byte counts reach the precision, with the numbers.
    """

    effective_bits: float = 8.0
    tokens: int = 512
    ring: RingParameters | None = None
    costs: CostModel = field(default_factory=CostModel)
    stored_hints: bool = True
    calibrated: bool = True

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        circuits: list[LinearParameters] = []
        forward_only = without_gradient(model, "QuantizedLinear")
        for node in nodes_of_type(model, "QuantizedLinear"):
            if node.metadata_props.get(PLACEMENT) != "worker":
                continue
            weight = constant_of(node.inputs[1])
            assert weight is not None
            for direction, norms in zip(DIRECTIONS, measure_norms(torch.from_numpy(weight)), strict=True):
                if direction == "backward" and node in forward_only:
                    continue
                crest = _crest(node, direction)
                gain = _gain(node, direction, norms) if self.calibrated else 1.0
                parameters = self._cheapest(f"{module_path(node)}, {direction}", norms, crest, weight.itemsize, gain)
                circuits.append(parameters)
                for attribute in (
                    ir.AttrInt64(f"{direction}_upload_limbs", parameters.upload_limbs),
                    ir.AttrInt64(f"{direction}_reply_bytes", parameters.reply_bytes),
                    ir.AttrFloat32(f"{direction}_crest", crest),
                    ir.AttrFloat32(f"{direction}_gain", parameters.gain),
                ):
                    before = node.attributes.get(attribute.name)
                    modified |= before is None or before.value != attribute.value
                    node.attributes[attribute.name] = attribute
        ring = self.ring or choose_ring(self.tokens, circuits, self.costs, self.stored_hints)
        chosen = {RING_DIM: str(ring.ring_dim), RANK: str(ring.rank), PACKED: str(ring.packed).lower()}
        modified |= any(model.metadata_props.get(key) != value for key, value in chosen.items())
        model.metadata_props.update(chosen)
        return ir.passes.PassResult(model, modified)

    def _cheapest(
        self, where: str, norms: WeightNorms, crest: float, weight_bytes: int, gain: float
    ) -> LinearParameters:
        best, best_bits = None, -math.inf
        reaching: list[LinearParameters] = []
        for limbs, reply in _BYTE_COUNTS:
            try:
                candidate = LinearParameters.from_norms(norms, 8 * limbs, 8 * reply, gain)
            except HecompileError:
                continue  # so few bytes that no input fits
            if not can_be_verified(candidate):
                continue
            if gain > 1 and largest_factor(candidate, norms) is None:
                candidate = candidate.proven
            bits = effective_bits(candidate, norms, crest)
            if bits >= self.effective_bits:
                reaching.append(candidate)
            elif bits > best_bits:
                best, best_bits = candidate, bits
        if reaching:
            return min(reaching, key=lambda p: self.costs.wire(p, 1) + self.costs.worker(p, 1, weight_bytes))
        raise InputError(
            f"{where}: {self.effective_bits} effective bits cannot be reached; "
            f"the best is {best_bits:.1f} with {best.upload_limbs if best else 4} bytes up. "
            "Ask for a lower precision, or for fewer weight bits"
        )


def choose_ring(
    tokens: int,
    circuits: Sequence[LinearParameters] = (),
    costs: CostModel | None = None,
    stored_hints: bool = True,
) -> RingParameters:
    """Choose the ring from the catalogue that costs the least for `tokens` tokens through every circuit.

    The cost is the client's work and, where hints are not stored, the time to fetch them. Without circuits it is that of one
    with as many inputs as outputs. Among rings within a fifth of the least cost the most secure is taken, up to 160 bits,
    then the one with the smallest hints. Raises InputError for fewer than one token.
    """
    if tokens < 1:
        raise InputError(f"the number of tokens per step must be positive, got {tokens}")
    prices = costs or CostModel()
    inputs = sum(p.in_features for p in circuits) or 1
    outputs = sum(p.out_features for p in circuits) or 1

    def work(ring: RingParameters) -> float:
        hints = 0.0 if stored_hints else sum(prices.fetched_hint(ring, p) for p in circuits)
        return prices.encrypt(ring, tokens, inputs) + prices.decrypt(ring, tokens, outputs) + hints

    least = min(work(ring) for ring in CATALOGUE.values())
    similar = [ring for ring in CATALOGUE.values() if work(ring) <= _SIMILAR_COST * least]
    return max(similar, key=lambda ring: (min(ring.security_bits, AMPLE_BITS), -ring.lattice_dim, -work(ring)))


def selected_ring(model: ir.Model) -> RingParameters:
    """Read the ring that the pass wrote into `model`. Raises LegalityError when it has not run."""
    if RING_DIM not in model.metadata_props:
        raise LegalityError("no ring was selected: run select_parameters first")
    packed = model.metadata_props.get(PACKED) == "true"
    return RingParameters(int(model.metadata_props[RING_DIM]), int(model.metadata_props[RANK]), packed=packed)


def _crest(node: ir.Node, direction: str) -> float:
    if direction == "forward":
        return largest_crest([node.inputs[0]], RANGE)
    # A stacked gradient is as uneven as its most uneven part.
    return largest_crest(_results(node), GRADIENT_RANGE)


def _gain(node: ir.Node, direction: str, norms: WeightNorms) -> float:
    """Return the gain of a product's bound by calibration, in float32, as the graph holds it."""
    weight = constant_of(node.inputs[1])
    assert weight is not None and node.inputs[0] is not None
    values, key = (_results(node), PRODUCT_PEAK) if direction == "forward" else ([node.inputs[0]], GRADIENT_PEAK)
    peaks = [float(value.metadata_props[key]) for value in values if key in value.metadata_props]
    largest = max(int(weight.max()), -int(weight.min()))
    return float(np.float32(calibrated_gain(max(peaks, default=0.0), norms, largest)))


def _results(node: ir.Node) -> list[ir.Value]:
    """Return the result of a linear and, where it is a stack, those of its parts."""
    return [node.outputs[0]] + [output for consumer in node.outputs[0].consumers() for output in consumer.outputs]
