"""Choosing ring and byte counts: text, the precision at its edge, what is left alone, what is refused."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest
import torch

from hecompile.errors import InputError, LegalityError
from hecompile.graph.ir import GRADIENT_RANGE, PLACEMENT, RANGE, attributes_of, print_model
from hecompile.he.parameters import CATALOGUE, LinearParameters, RingParameters
from hecompile.he.weight_norms import measure_norms
from hecompile.passes.offload.select_parameters import choose_ring, selected_ring
from hecompile.plan.circuits import effective_bits
from hecompile.plan.costs import CostModel
from tests.conftest import Golden
from tests.support.graphs import evaluate, integers, parse, prepared, refused, run_pass

WEIGHT = np.array([[100, -50, 3, 0], [127, 127, -127, 127]], dtype=np.int8)
NORMS, _ = measure_norms(torch.from_numpy(WEIGHT))
TEXT = """
model (float[B,S,4] x) => (float[B,S,2] y)
<int8[2,4] w = {100, -50, 3, 0, 127, 127, -127, 127}, float[2] s = {0.5, 0.25}>
{
    y = hecompile.QuantizedLinear (x, w, s)
}
"""
PATH = "model.layers.0.mlp.down_proj"
CREST = 2.0


def model_with_ranges() -> ir.Model:
    model = prepared(parse(TEXT, {"y": PATH}))
    model.graph.inputs[0].metadata_props[RANGE] = json.dumps({"max": 3.0, "crest": CREST})
    model.graph.outputs[0].metadata_props[GRADIENT_RANGE] = json.dumps({"max": 3.0, "crest": 4.0})
    return model


def attributes(model: ir.Model) -> dict[str, object]:
    return attributes_of(model.graph.node(0))


def test_golden(golden: Golden) -> None:
    model, x = model_with_ranges(), integers(2, 3, 4)
    before = evaluate(model, x=x)
    result = run_pass(model, "select_parameters", effective_bits=9.0, tokens=300)
    assert result.modified
    golden.check("select_parameters", print_model(result.model))
    assert torch.equal(evaluate(result.model, x=x), before)


def test_untouched_when_selected_already() -> None:
    model = run_pass(model_with_ranges(), "select_parameters").model
    before = print_model(model)
    result = run_pass(model, "select_parameters")
    assert not result.modified
    assert print_model(result.model) == before


def test_untouched_on_the_client() -> None:
    model = model_with_ranges()
    model.graph.node(0).metadata_props[PLACEMENT] = "client"
    run_pass(model, "select_parameters")
    assert attributes(model) == {}


def test_refused_precision_names_the_linear_and_the_best() -> None:
    error = refused(model_with_ranges(), "select_parameters", effective_bits=30.0)
    assert isinstance(error, InputError)
    best = effective_bits(LinearParameters.from_norms(NORMS), NORMS, CREST)
    expected = f"{PATH}, forward: 30.0 effective bits cannot be reached; the best is {best:.1f} with words of 32 bits. "
    assert str(error).startswith(expected + "Ask for")


def test_boundary_bits_that_are_just_reached_and_just_missed() -> None:
    """To the last bit down, and over the wire to the last bit up."""
    model = model_with_ranges()
    run_pass(model, "select_parameters", effective_bits=6.0)
    up, down = attributes(model)["forward_upload_bits"], attributes(model)["forward_reply_bits"]
    reached = effective_bits(LinearParameters.from_norms(NORMS, up, down), NORMS, CREST)
    run_pass(model, "select_parameters", effective_bits=reached)
    assert (attributes(model)["forward_upload_bits"], attributes(model)["forward_reply_bits"]) == (up, down)
    run_pass(model, "select_parameters", effective_bits=reached + 1e-9)
    assert attributes(model)["forward_upload_bits"] + attributes(model)["forward_reply_bits"] == up + down + 1


def test_boundary_a_matrix_of_zeros_needs_the_fewest_bits() -> None:
    model = prepared(parse(TEXT.replace("{100, -50, 3, 0, 127, 127, -127, 127}", "{0, 0, 0, 0, 0, 0, 0, 0}"), {"y": PATH}))
    run_pass(model, "select_parameters", effective_bits=20.0)
    assert {key: attributes(model)[key] for key in ("forward_upload_bits", "backward_reply_bits")} == {
        "forward_upload_bits": 8, "backward_reply_bits": 8,
    }  # fmt: skip


def test_without_calibration_a_high_crest_is_assumed() -> None:
    model = prepared(parse(TEXT, {"y": PATH}))
    run_pass(model, "select_parameters")
    assert attributes(model)["forward_crest"] == attributes(model)["backward_crest"] == 16.0


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_ring_that_is_asked_for_is_taken(name: str) -> None:
    model = model_with_ranges()
    run_pass(model, "select_parameters", ring=CATALOGUE[name])
    keys = ("hecompile.ring_dim", "hecompile.rank")
    assert "x".join(model.metadata_props[key] for key in keys) == name


@pytest.mark.parametrize("tokens", [0, -3])
def test_refused_tokens(tokens: int) -> None:
    with pytest.raises(InputError, match=f"must be positive, got {tokens}"):
        choose_ring(tokens, [LinearParameters.from_norms(NORMS)], CostModel())


def test_the_ring_is_read_back_and_missed_where_the_pass_has_not_run() -> None:
    model = model_with_ranges()
    with pytest.raises(LegalityError, match="run select_parameters first"):
        selected_ring(model)
    run_pass(model, "select_parameters", ring=CATALOGUE["256x6"])
    assert selected_ring(model) == CATALOGUE["256x6"]


def test_the_ring_follows_the_number_of_tokens() -> None:
    """Short blocks for few tokens, long ones where the hint's transforms are shared by many; more security where two
    cost about the same, and small hints where both have plenty."""
    circuits = [LinearParameters.from_norms(NORMS)]
    chosen = {tokens: choose_ring(tokens, circuits, CostModel()).ring_dim for tokens in (32, 256, 1024, 8192)}
    assert list(chosen.values()) == sorted(chosen.values())
    assert chosen[32] == 128 and chosen[8192] >= 512
    assert choose_ring(8192, circuits, CostModel()).lattice_dim == 1536  # 2048x1 costs about as much


def test_of_rings_that_cost_about_the_same_the_more_secure_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    circuits, costs = [LinearParameters.from_norms(NORMS)], CostModel()
    weaker, stronger = RingParameters(256, 5), RingParameters(256, 6)  # 133 and 161 bits
    assert costs.encrypt(weaker, 1024, 64) < costs.encrypt(stronger, 1024, 64)
    for catalogue, chosen in (({"a": weaker, "b": stronger}, stronger), ({"a": weaker}, weaker)):
        monkeypatch.setattr("hecompile.passes.offload.select_parameters.CATALOGUE", catalogue)
        assert choose_ring(1024, circuits, costs) == chosen


def test_who_is_slow_decides_between_a_limb_and_bits_down() -> None:
    """Backward, 2 inputs and 4 outputs: a bit down costs two up on the wire; the worker has another product beyond 24 up."""
    model = model_with_ranges()
    _, norms = measure_norms(torch.from_numpy(WEIGHT))
    wanted = effective_bits(LinearParameters.from_norms(norms, 24, 24), norms, 4.0)
    chosen = {}
    for slow, costs in (("link", CostModel(worker_flops=1e18)), ("worker", CostModel(bandwidth=1e18))):
        run_pass(model, "select_parameters", effective_bits=wanted, costs=costs)
        chosen[slow] = attributes(model)["backward_upload_bits"], attributes(model)["backward_reply_bits"]
    assert chosen["worker"] == (24, 24)
    assert chosen["link"][0] > 24 and 2 * chosen["link"][0] + 4 * chosen["link"][1] < 2 * 24 + 4 * 24
