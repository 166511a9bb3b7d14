"""Check a split plan before anything is written: legality, security, overflow, noise, secrecy.

    (client plan, circuits, ring)  →  unchanged, or an error that names the node and the numbers
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import onnx_ir as ir
import torch

from hecompile.errors import LegalityError, SecurityError
from hecompile.graph.gradients import without_gradient
from hecompile.graph.ir import PLACEMENT, attributes_of, nodes_of_type
from hecompile.graph.legality import CLIENT_PLAN, check_stage
from hecompile.he.parameters import RingParameters
from hecompile.he.security import MINIMUM_BITS, show_bits
from hecompile.he.weight_norms import measure_norms
from hecompile.he.wraps import largest_factor
from hecompile.plan.circuits import DIRECTIONS, RemoteCircuit, SplitPlan, effective_bits

_ACCUMULATOR_LIMIT = 2**31
_LARGEST_PRODUCT = 255 * 128  # of a uint8 limb and an int8 weight digit


@dataclass(frozen=True)
class Validate:
    """Check a split plan for `ring`; each product must be predicted to have `effective_bits`."""

    ring: RingParameters
    effective_bits: float

    def __call__(self, plan: SplitPlan) -> None:
        """Check `plan` and change nothing. Raises LegalityError or SecurityError."""
        check_stage(plan.client, CLIENT_PLAN)
        if self.ring.insecure or self.ring.security_bits < MINIMUM_BITS:
            raise SecurityError(
                f"the ring gives {show_bits(self.ring.security_bits)} of security, under {MINIMUM_BITS:.0f}"
            )
        circuits = {circuit.name: circuit for circuit in plan.circuits}
        self._check_matching(plan, circuits)
        for circuit in plan.circuits:
            self._check_circuit(circuit)
        _check_client_holds_no_weight(plan)

    def _check_matching(self, plan: SplitPlan, circuits: dict[str, RemoteCircuit]) -> None:
        forward_only = without_gradient(plan.client, "RemoteLinear")
        wanted = {
            f"{attributes_of(node)['linear']}.{direction}"
            for node in nodes_of_type(plan.client, "RemoteLinear")
            for direction in (DIRECTIONS[:1] if node in forward_only else DIRECTIONS)
        }
        for missing in sorted(wanted ^ circuits.keys()):
            raise LegalityError(f"circuit {missing} is {'missing' if missing in wanted else 'used by no RemoteLinear'}")
        for node in plan.client.graph:
            if node.metadata_props.get(PLACEMENT) == "worker":
                raise SecurityError(
                    f"node {node.name} ({node.op_type}) is placed on the worker but stands in the client plan"
                )

    def _check_circuit(self, circuit: RemoteCircuit) -> None:
        parameters = circuit.parameters
        accumulated = _LARGEST_PRODUCT * parameters.in_features
        if accumulated >= _ACCUMULATOR_LIMIT:
            raise LegalityError(
                f"{circuit.name}: {parameters.in_features} inputs sum up to {accumulated}, over the int32 accumulator's 2^31"
            )
        weight = circuit.weight
        if weight.shape != (parameters.in_features, parameters.out_features):
            raise LegalityError(f"{circuit.name}: the weight is {weight.shape}, its parameters say otherwise")
        # The input bound, and so the promise that nothing overflows mod q, rests on these norms.
        norms, _ = measure_norms(torch.from_numpy(weight.T))  # of [features_out, features_in]
        measured = dataclasses.replace(parameters, max_l1=norms.max_l1, max_l2=norms.max_l2)
        if measured != parameters:
            raise LegalityError(
                f"{circuit.name}: the weight has row norms {measured.max_l1} and {measured.max_l2:.6g}, its parameters say "
                f"{parameters.max_l1} and {parameters.max_l2:.6g}"
            )
        worst = parameters.max_l1 * parameters.input_bound + parameters.noise_bound
        if worst >= 2**31:
            raise LegalityError(f"{circuit.name}: a result can reach {worst}, over q/2 = 2^31")
        if parameters.gain > 1 and largest_factor(parameters, norms) is None:
            raise LegalityError(f"{circuit.name}: a product beyond its proven bound could wrap unseen")
        bits = effective_bits(parameters, norms, circuit.crest)
        if bits < self.effective_bits - 1e-6:
            raise LegalityError(
                f"{circuit.name}: {bits:.2f} effective bits predicted, {self.effective_bits} asked for"
            )


def _check_client_holds_no_weight(plan: SplitPlan) -> None:
    """Check that remote weights have left the client plan: an integer matrix there belongs to a linear computed there."""
    for name, value in plan.client.graph.initializers.items():
        integer = value.dtype in (ir.DataType.INT8, ir.DataType.INT16)
        if integer and not any(node.op_type == "QuantizedLinear" for node in value.consumers()):
            raise LegalityError(f"the client plan still holds the weight {name}, which no node of it uses")
