"""Depth and refreshes: text, hand-counted levels, and the cheapest placement against trying them all."""

from __future__ import annotations

import itertools

import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hecompile.errors import HecompileError, InputError
from hecompile.graph.ir import LEVEL, print_model
from hecompile.graph.legality import POLYNOMIAL, REFRESHED
from hecompile.inspection.polynomial import depth_table
from hecompile.passes.polynomial.depth import Depth
from hecompile.passes.polynomial.place_refreshes import PlaceRefreshes
from hecompile.polynomial.depth import circuit_cost, levels
from hecompile.polynomial.refresh_placement import Vertex, cheapest_refreshes
from tests.conftest import Golden
from tests.support.graphs import evaluate, gaussian, parse, refused, run_pass

# Wide values but for a narrow one in the middle, where a refresh is cheapest.
TEXT = """
block (float[B,4,6] x) => (float[B,4,6] y)
<float half = {0.5}, float[4,1] mask = {1.0, 0.0, -1.0, 1.0}, float[6,6] w = {1.0, 0.0, 0.0, 0.0, 0.0, 0.0,
 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0,
 0.0, 0.0, 0.0, 0.0, 0.0, 1.0}, int64[1] last = {2}>
{
    square = Mul (x, x)
    sum = ReduceSum <keepdims = 1> (square, last)
    halved = Mul (sum, half)
    inverse = Mul (halved, halved)
    masked = Mul (x, mask)
    scaled = Mul (masked, inverse)
    y = hecompile.Linear (scaled, w)
}
"""
SHAPES = {"square": 6, "sum": 1, "halved": 1, "inverse": 1, "masked": 6, "scaled": 6}


def block() -> ir.Model:
    model = parse(TEXT, {"y": "model.layers.0.mlp"})
    for node in model.graph:
        for value in node.outputs:
            if str(value.name) in SHAPES:
                value.shape = ir.Shape(["B", 4, SHAPES[str(value.name)]])
    return model


def test_levels_are_those_counted_by_hand(golden: Golden) -> None:
    model = run_pass(block(), "depth", POLYNOMIAL).model
    found = {str(value.name): level for value, level in levels(model).items()}
    assert found == {
        "x": 0, "square": 1, "sum": 1, "halved": 2, "inverse": 3, "masked": 0, "scaled": 4, "y": 5,
    }  # fmt: skip
    written = {str(value.name): value.metadata_props.get(LEVEL) for value in levels(model)}
    assert written == {name: str(level) for name, level in found.items()}
    golden.check("depth", print_model(model))
    counted = circuit_cost(model)
    # x·x and masked·inverse are 24 products each, the narrow square 4; by constants 4, and 24 numbers of 6 products each.
    assert (counted.ciphertext_products, counted.plaintext_products) == (24 + 4 + 24, 4 + 144)
    assert counted.modulus_bits(28) == 31 + (5 + 2) * 28  # the special prime, five levels and two primes at the end
    assert model.metadata_props["hecompile.depth.modulus_bits"] == str(31 + 7 * 30)
    assert circuit_cost(model, masks_are_free=False).plaintext_products == 4 + 144
    assert levels(model, masks_are_free=False)[next(v for v in levels(model) if v.name == "masked")] == 1


def test_refreshes_stand_where_they_are_cheapest(golden: Golden) -> None:
    model, x = block(), gaussian(2, 4, 6)
    before = evaluate(model, x=x)
    result = run_pass(model, "place_refreshes", REFRESHED, levels=3)
    assert result.modified
    golden.check("place_refreshes", print_model(result.model))
    assert torch.equal(evaluate(result.model, x=x), before)
    refreshed = [str(node.inputs[0].name) for node in result.model.graph if node.op_type == "Refresh" and node.inputs[0]]
    assert len(refreshed) == 1 and SHAPES[refreshed[0]] == 1
    assert circuit_cost(result.model).depth <= 3 and circuit_cost(result.model).refreshes == 4


def test_untouched_where_levels_suffice_and_refused_without_any() -> None:
    model = block()
    before = [node.op_type for node in model.graph]
    assert not run_pass(model, "place_refreshes", REFRESHED, levels=5).modified
    assert [node.op_type for node in model.graph] == before
    assert run_pass(block(), "place_refreshes", REFRESHED, levels=4).modified
    for levels_given in (0, -1):
        with pytest.raises(InputError, match="at least one level"):
            PlaceRefreshes(levels_given)
    with pytest.raises(InputError, match="22 to 30"):
        Depth(bits_per_level=10)


def test_a_graph_too_deep_for_any_parameters_is_shown_as_that() -> None:
    squares = "".join(f"x{number + 1} = Mul (x{number}, x{number})\n" for number in range(40))
    model = parse(f"deep (float[B,2] x0) => (float[B,2] x40) {{ {squares} }}")
    for node in model.graph:
        node.outputs[0].shape = ir.Shape(["B", 2])
    names, values = (list(column.cells) for column in depth_table(model).columns)
    shown = dict(zip(names, values, strict=True))
    assert shown["levels"] == "40" and shown["modulus bits at 30 per level"] == str(31 + 42 * 30)
    assert (
        shown["ring dimension at 128 bits (MATZOV, classical)"] == "none: at most 423 bits are allowed; place refreshes"
    )


def test_refused_a_second_time_and_before_expansion() -> None:
    model = run_pass(block(), "place_refreshes", REFRESHED, levels=3).model
    assert "refreshes already" in str(refused(model, "place_refreshes", REFRESHED, levels=3))
    unknown = parse(TEXT, {})
    error = refused(unknown, "place_refreshes", REFRESHED, levels=3)
    assert isinstance(error, HecompileError) and "run expand_polynomials first" in str(error)


@st.composite
def graphs(draw: st.DrawFn) -> list[Vertex]:
    """Up to nine values computed from one or two earlier ones."""
    vertices = [Vertex((), 0, draw(st.integers(1, 9)))]
    for number in range(1, draw(st.integers(3, 9))):
        operands = draw(st.sets(st.integers(0, number - 1), min_size=1, max_size=2))
        vertices.append(Vertex(tuple(sorted(operands)), draw(st.integers(0, 1)), draw(st.integers(1, 9))))
    return vertices


def _deepest(vertices: list[Vertex], refreshed: tuple[int, ...]) -> int:
    used: list[int] = []
    for vertex in vertices:
        inputs = [0 if u in refreshed else used[u] for u in vertex.operands]
        used.append(max(inputs, default=0) + vertex.cost)
    return max(used)


@settings(max_examples=60, deadline=None)
@given(graphs(), st.integers(1, 3))
def test_no_placement_is_cheaper(vertices: list[Vertex], available: int) -> None:
    placement = cheapest_refreshes(vertices, available)
    computed = [number for number, vertex in enumerate(vertices) if vertex.operands]
    best = min(
        sum(vertices[number].price for number in chosen)
        for size in range(len(computed) + 1)
        for chosen in itertools.combinations(computed, size)
        if _deepest(vertices, chosen) <= available
    )
    assert _deepest(vertices, placement.refreshed) <= available
    assert placement.price == best
    assert placement.bound <= best + 1e-6
