"""Attention by polynomials: text, meaning against formulas written out, domains, refusals, packed sequences."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from hecompile.errors import InputError, LegalityError
from hecompile.graph.interpreter import Interpreter, causal_attention_bias
from hecompile.graph.ir import attributes_of, print_model
from hecompile.graph.legality import CANONICAL
from hecompile.graph.matching import attentions
from hecompile.graph.operators import Context
from hecompile.passes.approximation.approximate_softmax import ApproximateSoftmax
from hecompile.polynomial.inputs import AttentionInputs
from hecompile.polynomial.ranges import AttentionRange, attention_range_of, check_domain, write_range
from tests.conftest import Golden
from tests.support.graphs import gaussian, parse, refused, run_pass

TEXT = """
attend (float[1,2,S,4] q, float[1,2,S,4] k, float[1,2,S,4] v, float[1,1,S,S] bias) => (float[1,2,S,4] y)
<float c = {0.5}>
{
    kt = Transpose <perm = [0, 1, 3, 2]> (k)
    scores = MatMul (q, kt)
    scaled = Mul (scores, c)
    biased = Add (scaled, bias)
    weights = Softmax <axis = -1> (biased)
    y = MatMul (weights, v)
}
"""
LENGTH = 6


def data() -> dict[str, Tensor]:
    inputs = {name: gaussian(1, 2, LENGTH, 4, seed=seed) for seed, name in enumerate("qkv")}
    return inputs | {"bias": causal_attention_bias(torch.ones(1, LENGTH, dtype=torch.int64))}


def attention_inputs(inputs: dict[str, Tensor], factor: float = 1.0) -> AttentionInputs:
    return AttentionInputs(inputs["q"] * factor, inputs["k"], inputs["bias"], 0.5)


def block(calibrated: bool = True) -> ir.Model:
    model = parse(TEXT, {"y": "model.layers.0.self_attn"})
    if calibrated:
        (node, _), *_ = attentions(model)
        inputs = data()
        write_range(node.outputs[0], AttentionRange.measure(attention_inputs(inputs)))
    return model


def run(model: ir.Model, context: Context | None = None, **changes: Tensor) -> Tensor:
    (y,) = Interpreter(model).run(data() | changes, context).values()
    return y


def expected(variant: str, form: str = "lipschitz", epsilon: float = 1e-3) -> Tensor:
    """The exact function, written out in float64."""
    q, k, v, bias = (data()[name].double() for name in ("q", "k", "v", "bias"))
    mask = (bias == 0).double()
    t = q @ k.transpose(-1, -2) / 2
    if variant == "gaussian_kernel":
        distance = (q[:, :, :, None] - k[:, :, None]).square().sum(-1)  # [1, 2, S, S]
        return (torch.exp(-distance / 4) * mask) @ v
    if variant == "chebyshev":
        return torch.softmax(t + bias, -1) @ v
    if form == "stable":
        t = t / ((t * mask).abs().amax(-1, keepdim=True) + 1e-6)
    weights = t**4 * mask
    if form == "length_agnostic":
        weights = weights / mask.sum(-1, keepdim=True)
    return weights / (weights.sum(-1, keepdim=True) + epsilon) @ v


CASES = {
    "power": {"variant": "power"},
    "power_lipschitz": {"variant": "power", "form": "lipschitz", "division": "goldschmidt"},
    "power_length_agnostic": {"variant": "power", "form": "length_agnostic", "division": "goldschmidt"},
    "gaussian_kernel": {"variant": "gaussian_kernel"},
    "chebyshev": {"variant": "chebyshev"},
}


@pytest.mark.parametrize("name", CASES)
def test_golden_and_meaning(golden: Golden, name: str) -> None:
    options = CASES[name]
    result = run_pass(block(), "approximate_softmax", CANONICAL, **options)
    assert result.modified
    (node,) = result.model.graph
    given = attributes_of(node)
    # Coefficients and bounds differ in their last digits between machines: three are shown.
    shown = {
        key: [f"{x:.3g}" for x in value] if isinstance(value, (list, tuple)) else value
        for key, value in ((k, f"{v:.3g}" if isinstance(v, float) else v) for k, v in given.items())
    }
    text = f"%{node.outputs[0].name} = {node.op_type}({', '.join(str(v.name) for v in node.inputs if v)})\n"
    golden.check(f"approximate_softmax_{name}", text + "".join(f"  {key} = {shown[key]}\n" for key in sorted(shown)))
    form = str(options.get("form", "stable"))
    wanted = expected(options["variant"], form)
    # A weight's error against v, whose entries are at most a few: the bound is on weights (Gaussian), or on their sum.
    largest_v = float(data()["v"].abs().max())
    keys = LENGTH if name == "gaussian_kernel" else 1
    # In float64: in float32 Goldschmidt's division of a small divisor also loses the bits of upper / lower.
    found = run(result.model, **{key: value.double() for key, value in data().items()})
    assert float((found - wanted).abs().max()) <= given["error_bound"] * largest_v * keys + 1e-6
    before = print_model(result.model)
    again = run_pass(result.model, "approximate_softmax", CANONICAL, **options)
    assert not again.modified and print_model(again.model) == before


@pytest.mark.parametrize("variant", ["power", "gaussian_kernel"])
def test_the_exact_form_comes_before_calibration_and_is_fitted_after(variant: str) -> None:
    """As the pipeline runs it: structure, calibration of the function that was trained, then the domain."""
    options = {"variant": variant} | ({"form": "lipschitz", "division": "goldschmidt"} if variant == "power" else {})
    model = run_pass(block(calibrated=False), "approximate_softmax", CANONICAL, **options, fit=False).model
    torch.testing.assert_close(run(model), expected(variant).float(), atol=2e-5, rtol=2e-5)
    (node,) = model.graph
    write_range(node.outputs[0], attention_range_of(next(iter(attentions(block())))[0].outputs[0]))  # type: ignore[arg-type]
    fitted = run_pass(model, "approximate_softmax", CANONICAL, **options)
    assert fitted.modified
    (node,) = fitted.model.graph
    assert attributes_of(node)["error_bound"] > 0


def test_chebyshev_without_fit_leaves_softmax() -> None:
    model = block(calibrated=False)
    before = print_model(model)
    assert not run_pass(model, "approximate_softmax", CANONICAL, variant="chebyshev", fit=False).modified
    assert print_model(model) == before


def test_attention_of_another_form_is_untouched_and_refused_by_the_pipeline() -> None:
    model = parse(TEXT.replace("Softmax <axis = -1>", "Softmax <axis = 2>"), {"weights": "model.layers.0.self_attn"})
    error = refused(model, "approximate_softmax", CANONICAL, variant="power")
    assert "approximate_softmax" in str(error)


@pytest.mark.parametrize("name", CASES)
def test_packed_sequences_attend_to_their_own_past(name: str) -> None:
    model = run_pass(block(), "approximate_softmax", CANONICAL, **CASES[name]).model
    packed = run(model, Context(sequences=(2, 4)), bias=torch.zeros(1, 1, 1, 1))
    for start, end in ((0, 2), (2, 6)):
        part = {key: value[:, :, start:end] for key, value in data().items() if key != "bias"}
        alone = run(model, bias=causal_attention_bias(torch.ones(1, end - start, dtype=torch.int64)), **part)
        torch.testing.assert_close(packed[:, :, start:end], alone)


@pytest.mark.parametrize("name", CASES)
def test_gradients_flow(name: str) -> None:
    inputs = {key: value.double().requires_grad_() for key, value in data().items() if key != "bias"}
    model = run_pass(block(), "approximate_softmax", CANONICAL, **CASES[name]).model
    bias = data()["bias"].double()
    interpreter = Interpreter(model)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return interpreter.run({"q": q, "k": k, "v": v, "bias": bias})["y"]

    assert torch.autograd.gradcheck(function, tuple(inputs[key] for key in "qkv"), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variant": "power", "domain_upper": 0.01}, ("the score was seen between", "range loss")),
        (CASES["power_lipschitz"] | {"domain_upper": 0.01}, ("the score was seen between", "[-0.01, 0.01]")),
        (CASES["power_length_agnostic"] | {"domain_upper": 0.01}, ("the score was seen between", "[-0.01, 0.01]")),
        (CASES["power_length_agnostic"] | {"ratio_lower": 1.0, "ratio_upper": 2.0}, ("the divisor was seen", "[1, 2]")),
        (CASES["power_length_agnostic"] | {"max_iterations": 2}, ("Goldschmidt iterations", "more than 2")),
        ({"variant": "gaussian_kernel", "domain_lower": -0.5}, ("the exponent was seen between", "[-0.5, 0]")),
        ({"variant": "chebyshev", "domain_lower": -0.5}, ("the score less its shift",)),
        ({"variant": "chebyshev", "length": 3}, ("the number of keys",)),
        ({"variant": "chebyshev", "max_degree": 2}, ("needs a degree above 2",)),
        (
            {"variant": "power", "form": "lipschitz", "division": "goldschmidt", "ratio_lower": 1.0, "ratio_upper": 2.0},
            ("the divisor was seen between", "[1, 2]"),
        ),
        (
            {"variant": "power", "form": "lipschitz", "division": "goldschmidt", "max_iterations": 3},
            ("Goldschmidt iterations", "more than 3", "raise epsilon"),
        ),
    ],
)
def test_refused_where_calibration_leaves_the_domain_or_costs_too_much(
    options: dict[str, object], words: tuple[str, ...]
) -> None:
    error = refused(block(), "approximate_softmax", CANONICAL, **options)
    assert isinstance(error, LegalityError)
    assert "model.layers.0.self_attn" in str(error)
    for word in words:
        assert word in str(error)


@pytest.mark.parametrize("name", CASES)
def test_calibration_after_the_fact_refuses_a_domain_that_does_not_cover_it(name: str) -> None:
    model = run_pass(block(), "approximate_softmax", CANONICAL, **CASES[name]).model
    (node,) = model.graph
    inputs = data()
    for factor in (1.0, 8.0):
        write_range(node.outputs[0], AttentionRange.measure(attention_inputs(inputs, factor)))
        if factor == 1.0:
            check_domain(node)
    with pytest.raises(LegalityError, match=r"model\.layers\.0\.self_attn: the .* was seen between .*, outside the domain"):
        check_domain(node)


@pytest.mark.parametrize("options", [CASES[name] for name in CASES if name != "power"])
def test_refused_without_calibration(options: dict[str, object]) -> None:
    assert "run calibrate" in str(refused(block(calibrated=False), "approximate_softmax", CANONICAL, **options))


def test_boundary_a_domain_that_ends_where_calibration_does() -> None:
    (node, _), *_ = attentions(block())
    found = attention_range_of(node.outputs[0])
    assert found is not None
    lower = found.exponents.lower
    assert run_pass(block(), "approximate_softmax", CANONICAL, variant="gaussian_kernel", domain_lower=lower).modified
    refused(block(), "approximate_softmax", CANONICAL, variant="gaussian_kernel", domain_lower=lower * 0.999)


@pytest.mark.parametrize(
    "options",
    [
        {"variant": "relu"},
        {"power": 3},
        {"form": "stable", "division": "goldschmidt"},
        {"error": 0.0},
        {"epsilon": 0.0},
        {"margin": 0.5},
        {"ratio_lower": 1.0},
        {"ratio_lower": 2.0, "ratio_upper": 1.0},
        {"domain_lower": 1.0},
        {"domain_upper": -1.0},
    ],
)
def test_options_out_of_range(options: dict[str, object]) -> None:
    with pytest.raises(InputError, match="attention:"):
        ApproximateSoftmax(**options)  # type: ignore[arg-type]


def test_wide_scores_are_halved() -> None:
    """Scores some 200 apart: softmax all the same."""
    model = block(calibrated=False)
    (node, _), *_ = attentions(model)
    inputs = data()
    q = inputs["q"] * 40
    write_range(node.outputs[0], AttentionRange.measure(attention_inputs(inputs, 40)))
    found = attention_range_of(node.outputs[0])
    assert found is not None and found.scores.upper - found.scores.lower > 100
    model = run_pass(model, "approximate_softmax", CANONICAL, variant="chebyshev").model
    (node,) = model.graph
    given = attributes_of(node)
    assert given["halvings"] >= 4
    t = q.double() @ inputs["k"].double().transpose(-1, -2) / 2
    exact = torch.softmax(t + inputs["bias"].double(), -1) @ inputs["v"].double()
    error = float((run(model, q=q) - exact).abs().max())
    assert error <= given["error_bound"] * float(inputs["v"].abs().max()) + 1e-4


def test_options_are_a_value() -> None:
    options = ApproximateSoftmax()
    assert dataclasses.replace(options, fit=False).fit is False and options.fit
