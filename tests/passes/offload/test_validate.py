"""The final check of a plan: it changes nothing, and refuses each thing that can be wrong with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
import torch

from hecompile.compiler.pipeline import PASSES
from hecompile.errors import HecompileError, LegalityError, SecurityError
from hecompile.graph.ir import PLACEMENT, SECRECY, add_initializer
from hecompile.he.parameters import (
    CATALOGUE,
    LinearParameters,
    RingParameters,
    measure_norms,
    test_insecure_parameters,
)
from hecompile.plan.circuits import RemoteCircuit, SplitPlan
from tests.passes.offload.test_split import UP, selected, split
from tests.support.graphs import text_of

RING = CATALOGUE["512x3"]
FIRST = f"{UP}.forward"


def validate(plan: SplitPlan, ring: RingParameters = RING, effective_bits: float = 6.0) -> None:
    PASSES["validate"](ring, effective_bits)(plan)


def with_first(plan: SplitPlan, **changes: object) -> SplitPlan:
    return SplitPlan(plan.client, (dataclasses.replace(plan.circuits[0], **changes), *plan.circuits[1:]))


def test_untouched_a_good_plan_passes_as_it_is() -> None:
    plan = split(selected())
    circuits, before = plan.circuits, text_of(plan)
    validate(plan)
    assert plan.circuits is circuits and text_of(plan) == before


def test_boundary_the_precision_that_is_just_predicted() -> None:
    plan = split(selected())
    weakest = min(plan.circuits, key=lambda circuit: circuit.effective_bits)
    validate(plan, effective_bits=weakest.effective_bits)
    message = f"{weakest.name}: .* effective bits predicted"
    with pytest.raises(LegalityError, match=message):
        validate(plan, effective_bits=weakest.effective_bits + 1e-3)


@pytest.mark.parametrize("ring", CATALOGUE.values(), ids=CATALOGUE)
def test_every_ring_of_the_catalogue_passes(ring: RingParameters) -> None:
    validate(split(selected()), ring)


def test_refused_ring_without_security() -> None:
    with pytest.raises(SecurityError, match=r"the ring gives 0 bits \(MATZOV, classical\) of security, under 128"):
        validate(split(selected()), test_insecure_parameters())


def missing_circuit(plan: SplitPlan) -> SplitPlan:
    return SplitPlan(plan.client, plan.circuits[1:])


def unused_circuit(plan: SplitPlan) -> SplitPlan:
    return SplitPlan(plan.client, (*plan.circuits, dataclasses.replace(plan.circuits[0], linear="other")))


def illegal_operator(plan: SplitPlan) -> SplitPlan:
    node = ir.node("Ceil", [plan.client.graph.inputs[0]])
    plan.client.graph.append(node)
    return plan


def node_on_the_worker(plan: SplitPlan) -> SplitPlan:
    plan.client.graph.node(1).metadata_props[PLACEMENT] = "worker"
    return plan


def weight_left_behind(plan: SplitPlan) -> SplitPlan:
    value = add_initializer(plan.client.graph, f"{UP}.weight_int8", np.ones((2, 3), dtype=np.int8))
    value.metadata_props[SECRECY] = "public"
    return plan


def weight_of_another_shape(plan: SplitPlan) -> SplitPlan:
    weight = plan.circuits[0].weight[:, :1]
    return with_first(plan, read_weight=lambda: weight)


def weight_of_larger_norm(plan: SplitPlan) -> SplitPlan:
    """Its products could wrap mod q at the input bound that the parameters promise."""
    weight = np.full_like(plan.circuits[0].weight, -128)
    return with_first(plan, read_weight=lambda: weight)


def too_many_inputs(plan: SplitPlan) -> SplitPlan:
    return with_inputs(plan, 65794)


def with_inputs(plan: SplitPlan, features: int) -> SplitPlan:
    weight = np.ones((features, 2), dtype=np.int8)
    parameters = LinearParameters.from_weight(torch.from_numpy(weight.T.copy()))
    return with_first(plan, read_weight=lambda: weight, parameters=parameters)


REFUSED: dict[Callable[[SplitPlan], SplitPlan], tuple[type[HecompileError], str]] = {
    missing_circuit: (LegalityError, f"circuit {FIRST} is missing"),
    unused_circuit: (LegalityError, "circuit other.forward is used by no RemoteLinear"),
    illegal_operator: (LegalityError, "stage 'client plan', .*Ceil.* is not legal here"),
    node_on_the_worker: (SecurityError, r"\(Add\) is placed on the worker but stands in the client plan"),
    weight_left_behind: (LegalityError, f"the client plan still holds the weight {UP}.weight_int8"),
    weight_of_another_shape: (LegalityError, rf"{FIRST}: the weight is \(3, 1\), its parameters say otherwise"),
    weight_of_larger_norm: (LegalityError, f"{FIRST}: the weight has row norms 384 and 221.703, its parameters say 137 and"),
    too_many_inputs: (LegalityError, f"{FIRST}: 65794 inputs sum up to 2147516160, over the int32 accumulator's 2.31"),
}


@pytest.mark.parametrize("damage", REFUSED, ids=lambda damage: damage.__name__)
def test_refused(damage: Callable[[SplitPlan], SplitPlan]) -> None:
    error, message = REFUSED[damage]
    with pytest.raises(error, match=message):
        validate(damage(split(selected())))


def test_boundary_the_widest_linear_passes() -> None:
    validate(with_inputs(split(selected()), 65793))


def test_a_zero_matrix_is_exact_and_passes() -> None:
    plan = split(selected())
    first = plan.circuits[0]
    zeros = np.zeros_like(first.weight)
    norms, _ = measure_norms(torch.from_numpy(zeros.T))
    parameters = LinearParameters.from_norms(norms)
    exact = RemoteCircuit(first.linear, first.direction, parameters, lambda: zeros, norms, first.crest)
    assert exact.effective_bits == float("inf")
    validate(SplitPlan(plan.client, (exact, *plan.circuits[1:])), effective_bits=5.0)
