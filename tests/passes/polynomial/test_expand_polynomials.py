"""The expanded graph is the approximated one, made of sums and products alone; refreshes keep it within its levels."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch

from hecompile.errors import LegalityError
from hecompile.graph.interpreter import Interpreter, causal_attention_bias, graph_inputs
from hecompile.graph.ir import print_model
from hecompile.graph.legality import POLYNOMIAL
from hecompile.passes.approximation.approximate_rmsnorm import ApproximateRMSNorm
from hecompile.passes.approximation.approximate_silu import ApproximateSiLU
from hecompile.passes.approximation.approximate_softmax import ApproximateSoftmax
from hecompile.passes.approximation.calibrate import Calibrate
from hecompile.passes.polynomial.depth import Depth
from hecompile.passes.polynomial.expand_polynomials import ExpandPolynomials
from hecompile.passes.polynomial.place_refreshes import PlaceRefreshes
from hecompile.passes.raising.canonicalize import Canonicalize
from hecompile.passes.raising.simplify import Simplify
from tests.conftest import Golden
from tests.support.graphs import evaluate, gaussian, parse, refused, run_pass
from tests.support.tiny import exported, samples, tiny_llama

LEGAL = {
    "Add", "Sub", "Mul", "Neg", "MatMul", "ReduceSum", "Reshape", "Transpose", "Unsqueeze", "Squeeze", "Concat", "Split",
    "Slice", "Gather", "Constant", "Linear",
}  # fmt: skip
LENGTH, LEVELS = 8, 12


def approximated(variant: str) -> ir.Model:
    """As the pipeline does it: calibrated on the function that takes softmax's place, then fitted."""
    form = {"division": "goldschmidt", "form": "lipschitz"} if variant == "power" else {}
    exact, fitted = (ApproximateSoftmax(variant=variant, fit=fit, **form) for fit in (False, True))
    model = exported()
    for step in (
        Simplify(), Canonicalize(), exact, Calibrate(samples()), fitted, ApproximateRMSNorm(), ApproximateSiLU()
    ):  # fmt: skip
        model = step(model).model
    return model


BLOCK = """
block (float[B,S,4] x, float[1,1,S,S] attention_bias) => (float[B,S,4] y)
<float[4] gain = {1.0, 2.0, 0.5, 1.0},
 float[4,4] wq = {0.5, 0.0, 0.0, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.5},
 float[4,4] wg = {1.0, 0.0, 0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0},
 int64[4] heads = {0, 0, 2, 2}, int64[3] joined = {0, 0, 4}>
{
    normed = hecompile.PolynomialRMSNorm <epsilon = 0.5, variance_scale = 0.25, coefficients = [1.5, -0.5], newton_steps = 1,
     domain_lower = 0.5, domain_upper = 4.0, error_bound = 0.1> (x, gain)
    wide = hecompile.Linear (normed, wq)
    split = Reshape (wide, heads)
    q = Transpose <perm = [0, 2, 1, 3]> (split)
    attended = hecompile.GaussianAttention <scale = 0.5, squarings = 2, domain_lower = -4.0, domain_upper = 0.0,
     error_bound = 0.2> (q, q, q, attention_bias)
    back = Transpose <perm = [0, 2, 1, 3]> (attended)
    merged = Reshape (back, joined)
    between = Add (x, merged)
    gate = hecompile.Linear (between, wg)
    act = hecompile.PolynomialSiLU <coefficients = [0.5, 1.0, 0.25], domain_lower = -2.0, domain_upper = 2.0,
     error_bound = 0.3> (gate)
    up = hecompile.Linear (between, wq)
    gated = Mul (act, up)
    down = hecompile.Linear (gated, wg)
    y = Add (between, down)
}
"""


def test_golden_transformer_block(golden: Golden) -> None:
    paths = {"normed": "input_layernorm", "wide": "self_attn.q_proj", "attended": "self_attn", "gate": "mlp.gate_proj"}
    paths |= {"act": "mlp.act_fn", "up": "mlp.up_proj", "gated": "mlp", "down": "mlp.down_proj"}
    model = parse(BLOCK, {name: f"model.layers.0.{path}" for name, path in paths.items()})
    x = gaussian(2, 3, 4, seed=1)
    before = evaluate(model, x=x, attention_bias=causal_attention_bias(torch.ones(2, 3, dtype=torch.int64)))
    result = run_pass(model, "expand_polynomials", POLYNOMIAL, sequence_length=3)
    assert result.modified
    golden.check("expand_polynomials", print_model(result.model))
    torch.testing.assert_close(evaluate(result.model, x=x), before, atol=1e-5, rtol=1e-5)
    assert "cannot be expanded" in str(refused(result.model, "expand_polynomials", POLYNOMIAL, sequence_length=3))


def test_what_is_no_polynomial_is_refused_by_name() -> None:
    model = parse(BLOCK.replace("Mul (act, up)", "Div (act, up)"), {"gated": "model.layers.0.mlp"})
    error = refused(model, "expand_polynomials", POLYNOMIAL, sequence_length=3)
    assert isinstance(error, LegalityError) and "model.layers.0.mlp" in str(error) and "Div" in str(error)


@pytest.mark.parametrize("variant", ["power", "gaussian_kernel", "chebyshev"])
def test_the_function_is_kept_and_refreshes_keep_to_the_levels(variant: str) -> None:
    model = approximated(variant)
    tokens = torch.tensor(samples())
    (wanted,) = Interpreter(model).run(graph_inputs(tokens, torch.ones_like(tokens))).values()
    expanded = ExpandPolynomials(LENGTH)(model).model
    assert {node.op_type for node in expanded.graph} <= LEGAL
    embeds = {"inputs_embeds": tiny_llama().get_input_embeddings()(tokens).detach()}
    (found,) = Interpreter(expanded).run(embeds).values()
    assert float((found - wanted).abs().max()) <= 1e-3 * float(wanted.abs().max())

    deep = Depth()(expanded).model
    assert int(deep.metadata_props["hecompile.depth"]) > LEVELS
    refreshed = PlaceRefreshes(levels=LEVELS)(deep).model
    again = Depth()(refreshed).model
    assert int(again.metadata_props["hecompile.depth"]) <= LEVELS
    assert any(node.op_type == "Refresh" for node in again.graph)
