"""Placement: text, where the cut goes as costs change, and that no secret gets to the worker in the clear."""

from __future__ import annotations

import dataclasses
import math

import onnx_ir as ir
import pytest
import torch

from hecompile.errors import InputError, LegalityError, SecurityError
from hecompile.graph.ir import PLACEMENT, print_model
from hecompile.graph.secrecy import check_placement
from hecompile.passes.offload.place import Place
from hecompile.passes.offload.split import Split
from hecompile.plan.costs import CostModel
from tests.conftest import Golden
from tests.support.graphs import evaluate, integers, parse, placements, prepared, refused, run_pass

BLOCK = """
block (float[B,S,2] x) => (float[B,S,2] y)
<int8[2,2] wq = {1, -2, 3, 4}, float[2] sq = {0.5, 0.25}, int8[2,2] wo = {5, 6, -7, 8}, float[2] so = {1.0, 2.0},
 float[B,S,2] q, float[B,S,2] active>
{
    q = hecompile.QuantizedLinear (x, wq, sq)
    active = hecompile.SiLU (q)
    y = hecompile.QuantizedLinear (active, wo, so)
}
"""
PATHS = {"q": "model.layers.0.self_attn.q_proj", "active": "model.layers.0.act_fn", "y": "model.layers.0.o_proj"}


def block() -> ir.Model:
    model = parse(BLOCK, PATHS)
    run_pass(model, "annotate_secrecy")
    return model


def projections(sources: tuple[str, str, str], features: int = 8) -> ir.Model:
    """Three linears features → features, each of one of the inputs x, y, z; their results are added."""
    names = ("q", "k", "v")
    lines = [f"{name} = hecompile.QuantizedLinear ({source}, w, s)" for name, source in zip(names, sources, strict=True)]
    shape = f"float[B,S,{features}]"
    weight, scale = ", ".join(["1"] * features**2), ", ".join(["1.0"] * features)
    model = parse(
        f"""g ({shape} x, {shape} y, {shape} z) => ({shape} sum)
        <int8[{features},{features}] w = {{{weight}}}, float[{features}] s = {{{scale}}}, {shape} q, {shape} k, {shape} v>
        {{ {chr(10).join(lines)}
           part = Add (q, k)
           sum = Add (part, v) }}"""
    )
    run_pass(model, "annotate_secrecy")
    return model


FREE_CRYPTOGRAPHY = {
    "transform_flops": math.inf, "hint_bandwidth": math.inf, "encrypt_seconds": 0.0, "decrypt_seconds": 0.0,
}  # fmt: skip


# One linear 8 → 8 costs the client 4·64/256 = 1 s and the worker next to nothing; a value that crosses costs 8 · price.
def crossing(price: float) -> CostModel:
    return CostModel(client_flops=256.0, worker_flops=1e12, bandwidth=8 / price, **FREE_CRYPTOGRAPHY)


def test_golden(golden: Golden) -> None:
    model, x = block(), integers(2, 3, 2)
    before = evaluate(model, x=x)
    result = run_pass(model, "place")
    assert result.modified
    golden.check("place", print_model(result.model))
    assert torch.equal(evaluate(result.model, x=x), before)


def test_untouched_when_placed_already() -> None:
    model = prepared(parse(BLOCK, PATHS))
    before = print_model(model)
    result = run_pass(model, "place")
    assert not result.modified
    assert print_model(result.model) == before


def test_offload_pins_linears_to_the_worker_however_dear_and_everything_else_to_the_client() -> None:
    model = block()
    run_pass(model, "place", policy="offload", costs=crossing(1e9))
    assert {str(n.outputs[0].name): n.metadata_props[PLACEMENT] for n in model.graph} == {
        "q": "worker", "active": "client", "y": "worker",
    }  # fmt: skip


def test_the_cut_moves_with_bandwidth() -> None:
    for bandwidth, side in ((1e12, "worker"), (1.0, "client")):
        model = block()
        costs = CostModel(client_flops=1e6, bandwidth=bandwidth)
        run_pass(model, "place", policy="cheapest", costs=costs)
        assert set(placements(model).values()) == {side}, bandwidth


def test_the_cut_moves_with_client_speed() -> None:
    for flops, side in ((1e3, "worker"), (1e12, "client")):
        model = block()
        run_pass(model, "place", policy="cheapest", costs=CostModel(client_flops=flops))
        assert set(placements(model).values()) == {side}, flops


def test_the_cut_moves_with_worker_speed() -> None:
    for flops, side in ((1e12, "worker"), (1e3, "client")):
        model = block()
        run_pass(model, "place", policy="cheapest", costs=dataclasses.replace(crossing(1e-3), worker_flops=flops))
        assert set(placements(model).values()) == {side}, flops


def test_a_shared_upload_is_paid_once() -> None:
    """At 0.075 a value, three linears of their own inputs pay 6 crossings, 8·6·0.075 = 3.6 s for 3 s of client work: none
    goes. Sharing one input they pay 4, 2.4 s: all go, though each alone would pay 1.2 s for its 1 s."""
    separate, shared, one = projections(("x", "y", "z")), projections(("x", "x", "x")), projections(("x", "y", "y"))
    for model in (separate, shared, one):
        run_pass(model, "place", policy="cheapest", costs=crossing(0.075))
    assert set(placements(separate).values()) == {"client"}
    assert set(placements(shared).values()) == {"worker"}
    assert placements(one) == {"q": "client", "k": "worker", "v": "worker"}  # two share 3 crossings: 1.8 s for 2 s


def test_boundary_the_cut_turns_where_the_costs_are_equal() -> None:
    """Two crossings of 8 elements at p each against 1 s: the turn is at p = 1/16."""
    for price, side in ((0.999 / 16, "worker"), (1.001 / 16, "client")):
        model = projections(("x", "y", "z"))
        run_pass(model, "place", policy="cheapest", costs=crossing(price))
        assert set(placements(model).values()) == {side}, price


def test_a_result_of_the_graph_has_to_come_back_to_the_client() -> None:
    text = """g (float[B,2] x) => (float[B,8] y)
        <int8[8,2] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}, float[8] s = {1, 1, 1, 1, 1, 1, 1, 1}>
        { y = hecompile.QuantizedLinear (x, w, s) }"""
    for price, side in ((0.024, "worker"), (0.026, "client")):  # 2 + 8 elements cross for 4·16/256 = 0.25 s
        model = parse(text)
        run_pass(model, "annotate_secrecy")
        run_pass(model, "place", policy="cheapest", costs=crossing(price))
        assert placements(model) == {"y": side}


def test_refused_without_secrecy() -> None:
    error = refused(parse(BLOCK, PATHS), "place")
    assert isinstance(error, LegalityError)
    assert "run annotate_secrecy before place" in str(error)


def test_refused_policy() -> None:
    with pytest.raises(InputError, match="policy must be 'offload' or 'cheapest', got 'worker'"):
        Place(policy="worker")


def test_forged_placement_of_an_activation_is_refused() -> None:
    model = prepared(parse(BLOCK, PATHS))
    model.graph.node(1).metadata_props[PLACEMENT] = "worker"
    for check in (check_placement, Split()):
        with pytest.raises(SecurityError, match=r"SiLU of model.layers.0.act_fn is placed on the worker, where .* secret q"):
            check(model)


def test_forged_placement_of_a_lora_branch_is_refused() -> None:
    text = "g (float[B,2] x, float[1,2] a, float[2,1] b) => (float[B,2] y) {{ y = hecompile.Lora {} (x, a, b) }}"
    model = parse(text.format("<scaling: float = 1.0, dropout: float = 0.0>"), {"y": "model.layers.0.q_proj"})
    prepared(model)
    model.graph.node(0).metadata_props[PLACEMENT] = "worker"
    with pytest.raises(SecurityError, match=r"Lora of model.layers.0.q_proj is placed on the worker"):
        check_placement(model)


@pytest.mark.parametrize("secret", ["w", "s"])
def test_linear_with_a_secret_weight_or_scale_is_refused_by_name(secret: str) -> None:
    """A weight merged with a LoRA product would be one."""
    inputs = {"w": "int8[2,2] w", "s": "float[2] s"}
    constants = {"w": "int8[2,2] w = {1, 2, 3, 4}", "s": "float[2] s = {1.0, 1.0}"}
    constant = next(text for name, text in constants.items() if name != secret)
    model = parse(
        f"g (float[B,2] x, {inputs[secret]}) => (float[B,2] y) <{constant}> {{ y = hecompile.QuantizedLinear (x, w, s) }}",
        {"y": "model.layers.0.q_proj"},
    )
    run_pass(model, "annotate_secrecy")
    error = refused(model, "place")
    assert isinstance(error, SecurityError)
    assert "model.layers.0.q_proj is secret and cannot be given to the worker" in str(error)


def test_a_value_whose_secrecy_is_unknown_counts_as_secret() -> None:
    model = parse("g (float[2] x) => (float[2] y) { y = Neg (x) }", {"y": "model.layers.0"})
    model.graph.node(0).metadata_props[PLACEMENT] = "worker"
    with pytest.raises(SecurityError, match=r"Neg of model\.layers\.0"):
        check_placement(model)
