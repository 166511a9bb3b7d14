"""The expanded graph is the approximated one, made of sums and products alone; refreshes keep it within its levels."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch

from hecompile.interpreter import Interpreter, graph_inputs
from passes.approximate_rmsnorm import ApproximateRMSNorm
from passes.approximate_silu import ApproximateSiLU
from passes.approximate_softmax import ApproximateSoftmax
from passes.calibrate import Calibrate
from passes.canonicalize import Canonicalize
from passes.depth import Depth
from passes.expand_polynomials import ExpandPolynomials
from passes.place_refreshes import PlaceRefreshes
from passes.simplify import Simplify
from tests.compiler.tiny import exported, samples, tiny_llama

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
