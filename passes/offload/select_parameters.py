"""Choose the cheapest ring, and the bits of the words that travel for every linear on the worker, for a wanted precision.

    QuantizedLinear(x, Q, s) @worker  →  the node with upload_bits, reply_bits, crest and gain for each direction, the
                                          backward one where x needs a gradient
    model                              →  metadata: ring_dim, rank, packed

Precision is counted in *effective bits*: log2 of the rms of the exact product over the standard deviation of its noise. With
input bound X (no overflow, whatever comes), crest factor c of the encoded tokens, and rows of Euclidean norm ‖W_i‖:

    rms(W_i·x) ≈ ‖W_i‖·X/c      std(noise) = LinearParameters.noise_std(‖W_i‖)

(the first for inputs that are uncorrelated with the row, which is where precision is scarcest). With calibrated bounds X is
larger by a gain that calibration gives (`hecompile.plan.circuits.calibrated_gain`), unless words are so short that noise
would hide a product that wraps (`hecompile.he.wraps`); then these have the proven bound. The modulus is q = 2^32 for
every linear; each rounds what travels to a modulus of its own, 2^upload_bits up and 2^reply_bits down.

Among the pairs of 8 to 32 bits that reach the wanted precision, the pass takes the one with the least time on wire and
worker (`hecompile.plan.costs`): bits on the wire, whole bytes on the worker. The client's work does not depend on them. With
fewer bits of one word precision never grows, so of all pairs only the fewest bits down for each number up are looked at. A
reply must be fine enough to be verified (`hecompile.he.check_vectors`): 12 bits at 2048 outputs and more.

One ring serves the whole plan, that of the least client work. A product's precision does not depend on it, and a ring per
linear would save at most 1 % of that work (all shapes of Llama-3.2-1B, 32 to 4096 tokens, default costs) for the price of
several matrices A.

A stacked backward product has many inputs, and noise in proportion to its signal grows as their number: gate and up together
have 16384 at 1B size, and need words of 27 bits up and 15 down for 8 effective bits (normal weights of 8 bits): 59 kB per
token. Uploading the two gradients apart would save a bit per input up and cost a second reply: 61 kB. So they stay together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
from hecompile.he.parameters import CATALOGUE, LOG_Q, MIN_BITS, LinearParameters, RingParameters
from hecompile.he.security import AMPLE_BITS
from hecompile.he.weight_norms import WeightNorms, measure_norms
from hecompile.he.wraps import largest_factor
from hecompile.plan.circuits import DIRECTIONS, calibrated_gain, effective_bits, largest_crest
from hecompile.plan.costs import CostModel

RING_DIM, RANK, PACKED = "hecompile.ring_dim", "hecompile.rank", "hecompile.packed"
_SIMILAR_COST = 1.2  # sets whose costs differ by less count as equal


@dataclass(frozen=True)
class SelectParameters(ir.passes.InPlacePass):
    """Write ring and bits of words into the graph.

    effective_bits: precision wanted of every product. tokens: tokens per step that the ring is sized for. ring: fixes the
    ring instead. stored_hints: without them the worker's products for the hints count as well. Raises InputError when no
    words reach the precision, with the numbers.
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
            largest = max(int(weight.max()), -int(weight.min()))
            for direction, norms in zip(DIRECTIONS, measure_norms(torch.from_numpy(weight)), strict=True):
                if direction == "backward" and node in forward_only:
                    continue
                crest = _crest(node, direction)
                gain = _gain(node, direction, norms, largest) if self.calibrated else 1.0
                parameters = self._cheapest(f"{module_path(node)}, {direction}", norms, crest, weight.itemsize, gain)
                circuits.append(parameters)
                for attribute in (
                    ir.AttrInt64(f"{direction}_upload_bits", parameters.upload_bits),
                    ir.AttrInt64(f"{direction}_reply_bits", parameters.reply_bits),
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
        try:
            return cheapest_parameters(norms, crest, self.effective_bits, self.costs, weight_bytes, gain)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None


def cheapest_parameters(
    norms: WeightNorms, crest: float, wanted: float, costs: CostModel, weight_bytes: int = 1, gain: float = 1.0
) -> LinearParameters:
    """Choose the words with the least time on wire and worker for `wanted` effective bits.

    Raises InputError where no words reach them, with the most that any reach.
    """
    reaching = list(_reaching(norms, crest, wanted, gain))
    if reaching:
        return min(reaching, key=lambda p: costs.wire(p, 1) + costs.worker(p, 1, weight_bytes))
    best = _precision(norms, crest, LOG_Q, LOG_Q, gain)[0]
    raise InputError(
        f"{wanted} effective bits cannot be reached; the best is {best:.1f} with words of {LOG_Q} bits. "
        "Ask for a lower precision, or for fewer weight bits"
    )


def _reaching(norms: WeightNorms, crest: float, wanted: float, gain: float) -> Iterator[LinearParameters]:
    """Yield parameters that reach the precision: for each number of bits up, the fewest down that can be verified."""
    reply = MIN_BITS
    for upload in range(LOG_Q, MIN_BITS - 1, -1):
        # Bits down that were too few are too few with fewer up as well.
        while reply <= upload and _precision(norms, crest, upload, reply, gain)[0] < wanted:
            reply += 1
        for enough in range(reply, upload + 1):  # with all of them nothing is rounded, and so verified exactly
            candidate = _precision(norms, crest, upload, enough, gain)[1]
            if candidate is not None and can_be_verified(candidate):
                yield candidate
                break


def _precision(
    norms: WeightNorms, crest: float, upload: int, reply: int, gain: float
) -> tuple[float, LinearParameters | None]:
    """Return the effective bits of words of so many bits, -inf with None where no input fits."""
    try:
        parameters = LinearParameters.from_norms(norms, upload, reply, gain)
    except HecompileError:
        return -math.inf, None
    if gain > 1 and largest_factor(parameters, norms) is None:
        parameters = parameters.proven
    return effective_bits(parameters, norms, crest), parameters


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


def _gain(node: ir.Node, direction: str, norms: WeightNorms, largest: int) -> float:
    """Return the gain of a product's bound by calibration, in float32, as the graph holds it.

    largest: the largest magnitude of the weights.
    """
    assert node.inputs[0] is not None
    values, key = (_results(node), PRODUCT_PEAK) if direction == "forward" else ([node.inputs[0]], GRADIENT_PEAK)
    peaks = [float(value.metadata_props[key]) for value in values if key in value.metadata_props]
    return float(np.float32(calibrated_gain(max(peaks, default=0.0), norms, largest)))


def _results(node: ir.Node) -> list[ir.Value]:
    """Return the result of a linear and, where it is a stack, those of its parts."""
    return [node.outputs[0]] + [output for consumer in node.outputs[0].consumers() for output in consumer.outputs]
