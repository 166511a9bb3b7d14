"""SiLU as a table of integers: text, meaning, the error bound, domains and refusals."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hecompile.approximation.silu import silu
from hecompile.approximation.silu_table import TABLE_BITS, ActivationTable, silu_table
from hecompile.compiler.pipeline import lower_linear
from hecompile.compiler.polynomial_options import PolynomialOptions
from hecompile.errors import InputError, LegalityError
from hecompile.graph.interpreter import Interpreter, graph_inputs
from hecompile.graph.ir import attributes_of, nodes_of_type, print_model
from hecompile.graph.legality import CANONICAL, POLYNOMIAL, check_stage
from hecompile.graph.operators import Context
from hecompile.graph.quantized_operators import table_indices, table_values
from hecompile.passes.approximation.quantize_activation import QuantizeActivation
from hecompile.polynomial.ranges import Interval, check_domain, write_range
from tests.conftest import Golden
from tests.support.graphs import evaluate, parse, product_of, refused, run_pass
from tests.support.tiny import OPTIONS, coarse, exported, samples, tiny_llama

TEXT = "act (float[B,8] x) => (float[B,8] y) { y = hecompile.SiLU (x) }"
WHERE = "model.layers.0.mlp"


def graph(seen: tuple[float, float] | None) -> ir.Model:
    model = parse(TEXT, {"y": WHERE})
    if seen is not None:
        write_range(next(iter(model.graph)).outputs[0], Interval(*seen))
    return model


def test_golden(golden: Golden) -> None:
    model = graph((-9.0, 5.0))
    result = run_pass(model, "quantize_activation", CANONICAL, bits=4)
    assert result.modified
    golden.check("quantize_activation", coarse(print_model(result.model)))
    (node,) = result.model.graph
    table = attributes_of(node)
    x = torch.linspace(-40.0, 6.0, 8 * 401).reshape(-1, 8)  # also far below what was seen
    y = evaluate(result.model, x=x)
    error = float((y - F.silu(x)).abs().max())
    assert table["error_bound"] / 3 < error <= table["error_bound"] + 1e-6
    assert set(y.unique().tolist()) <= {float(table_values(torch.tensor(n), table)) for n in range(16)}
    assert not run_pass(result.model, "quantize_activation", CANONICAL).modified


@pytest.mark.parametrize("bits", TABLE_BITS)
def test_the_operator_is_its_integer_form(bits: int) -> None:
    """Index, cleartext look-up in numpy, and back: the same numbers to the last bit."""
    model = run_pass(graph((-20.0, 12.0)), "quantize_activation", CANONICAL, bits=bits).model
    (node,) = model.graph
    given = attributes_of(node)
    x = torch.linspace(-30.0, 20.0, 8 * 300).reshape(-1, 8)
    integers = ActivationTable.of(given).lookup(table_indices(x, given).numpy())
    assert integers.min() >= 0 and integers.max() < 1 << bits
    assert torch.equal(table_values(torch.from_numpy(integers), given), evaluate(model, x=x))


@settings(max_examples=150, deadline=None)
@given(
    bits=st.sampled_from(TABLE_BITS),
    lowest=st.floats(-60.0, 0.0),
    upper=st.floats(1e-3, 60.0),
    places=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=50),
)
def test_error_bound(bits: int, lowest: float, upper: float, places: list[float]) -> None:
    table = silu_table(bits, lowest, upper)
    bottom = table.lower - 50.0 if table.is_flat_below else table.lower
    x = bottom + (table.upper - bottom) * np.asarray(places)
    index = np.clip(np.rint((x - table.lower) / table.input_scale), 0, (1 << bits) - 1).astype(int)
    y = (table.lookup(index) - table.zero) * table.output_scale
    assert np.abs(y - silu(x)).max() <= table.error_bound * (1 + 1e-6)
    assert table.is_flat_below or table.lower == pytest.approx(lowest, rel=1e-6)
    assert table.upper == pytest.approx(upper, rel=1e-5, abs=1e-5)


def test_one_bit_more_halves_the_error() -> None:
    bounds = [silu_table(bits, -20.0, 12.0).error_bound for bits in TABLE_BITS]
    for coarser, finer in pairwise(bounds):
        assert 1.6 < coarser / finer < 2.4


def test_gradient_goes_straight_through_up_to_the_end_of_the_table() -> None:
    model = run_pass(graph((-8.0, 4.0)), "quantize_activation", CANONICAL, margin=1.0).model
    x = torch.tensor([[-30.0, -3.0, -1.0, 0.0, 0.5, 3.0, 5.0, 50.0]], requires_grad=True)
    evaluate(model, x=x).sum().backward()
    exact = x.detach().clone().requires_grad_()
    F.silu(exact).sum().backward()
    assert x.grad is not None and exact.grad is not None
    assert torch.equal(x.grad[0, :6], exact.grad[0, :6]) and torch.equal(x.grad[0, 6:], torch.zeros(2))


def test_refused_without_calibration() -> None:
    error = refused(graph(None), "quantize_activation", CANONICAL)
    assert isinstance(error, LegalityError) and f"{WHERE}: nothing was recorded" in str(error)


def test_refused_beyond_the_domain_and_allowed_at_its_edge() -> None:
    error = refused(graph((-40.0, 6.0)), "quantize_activation", CANONICAL, domain_upper=5.0)
    assert isinstance(error, LegalityError)
    assert f"{WHERE}: the input of SiLU was seen up to 6, above the table's domain_upper 5" in str(error)
    model = run_pass(graph((-40.0, 6.0)), "quantize_activation", CANONICAL, domain_upper=6.0).model
    (node,) = model.graph
    write_range(node.outputs[0], Interval(-400.0, 6.0))
    check_domain(node)  # any lower number is clamped to where SiLU is flat
    write_range(node.outputs[0], Interval(-4.0, 7.0))
    with pytest.raises(LegalityError, match="between -4 and 7"):
        check_domain(node)


def test_boundary_no_negative_input_and_none_at_all() -> None:
    for seen in ((0.5, 3.0), (0.0, 0.0)):
        model = run_pass(graph(seen), "quantize_activation", CANONICAL, margin=1.0).model
        (node,) = model.graph
        assert attributes_of(node)["lower"] == 0.0 == attributes_of(node)["domain_lower"]
        assert float(evaluate(model, x=torch.zeros(1, 8)).abs().max()) == 0.0


@pytest.mark.parametrize("options", [{"bits": 3}, {"bits": 9}, {"margin": 0.9}, {"domain_upper": 0.0}])
def test_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match="activation: "):
        QuantizeActivation(**options)  # type: ignore[arg-type]


def test_a_malformed_table_is_refused() -> None:
    good = silu_table(4, -8.0, 4.0)
    for change in ({"entries": good.entries[1:]}, {"zero": 16}, {"input_scale": 0.0}, {"bits": 5}):
        with pytest.raises(InputError):
            dataclasses.replace(good, **change)  # type: ignore[arg-type]


def test_not_legal_where_only_sums_and_products_are() -> None:
    model = run_pass(graph((-4.0, 6.0)), "quantize_activation", CANONICAL).model
    with pytest.raises(LegalityError, match="QuantizedSiLU is not legal here"):
        check_stage(model, POLYNOMIAL)


def test_a_whole_plan_with_tables() -> None:
    """By name, through every pass; its logits are those of the model up to the tables and the weights."""
    plan, _ = lower_linear(exported(), dataclasses.replace(OPTIONS, activation="quantized"), samples())
    nodes = list(nodes_of_type(plan.client, "QuantizedSiLU"))
    assert len(nodes) == 2 and not list(nodes_of_type(plan.client, "SiLU"))
    tokens = torch.tensor([[5, 200, 31, 7, 90, 14]])
    adapter = {
        str(value.name): torch.zeros(value.shape.numpy())
        for value in plan.client.graph.inputs
        if ".lora_" in str(value.name) and value.shape is not None
    }
    inputs = graph_inputs(tokens, torch.ones_like(tokens)) | adapter
    with torch.no_grad():
        logits = Interpreter(plan.client).run(inputs, Context(remote=product_of(plan)))["logits"]
        expected = tiny_llama()(input_ids=tokens).logits
    assert 1e-4 < float((logits - expected).abs().max()) < 0.1  # logits of size 4


def test_chosen_by_name() -> None:
    assert PolynomialOptions().choosing(activation="quantized").activation == QuantizeActivation(8)
    six = PolynomialOptions().choosing(activation=QuantizeActivation(6))
    assert six.choosing(activation="quantized") == six and six.choosing(activation="exact") == PolynomialOptions()
    with pytest.raises(InputError, match="exact, polynomial, composed, quantized"):
        PolynomialOptions().choosing(activation="table")
