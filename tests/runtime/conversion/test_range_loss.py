"""Check that the range loss of private training is zero within the domains of polynomials and positive outside."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import onnx_ir as ir
import pytest
import torch

from hecompile.compiler.frontend import export_onnx, load_checkpoint
from hecompile.compiler.pipeline import approximate
from hecompile.compiler.polynomial_options import PolynomialOptions
from hecompile.graph.interpreter import Interpreter, packed_graph_inputs
from hecompile.graph.ir import nodes_of_type
from hecompile.graph.operators import Context
from hecompile.models import REDUCED_LLAMA
from hecompile.passes.approximation.approximate_softmax import ApproximateSoftmax
from hecompile.passes.approximation.calibrate import Calibrate
from hecompile.passes.offload.fuse import Fuse
from hecompile.polynomial.range_penalty import RangeTerms
from hecompile.runtime.client.range_terms import RangeLoss
from hecompile.runtime.conversion.data import load_rows
from tests.runtime.conversion.support import TEXT, recipe

NAMES = {"power": "PowerAttention", "gaussian_kernel": "GaussianAttention", "chebyshev": "ChebyshevAttention"}


@cache
def rows() -> torch.Tensor:
    return load_rows(recipe(TEXT).data, load_checkpoint(str(REDUCED_LLAMA)).tokenizer)[0][:8]


@cache
def exported() -> ir.Model:
    return export_onnx(load_checkpoint(str(REDUCED_LLAMA)).model)


@cache
def graph(attention: str) -> ir.Model:
    """Return the approximated graph, on the domains of calibration on `rows`, with margins."""
    options = PolynomialOptions().choosing(attention=attention, norm="polynomial", activation="polynomial")
    if attention == "power":
        options = replace(options, attention=ApproximateSoftmax("power", form="length_agnostic", division="goldschmidt"))
    return approximate(exported().clone(), options, Calibrate(tuple(map(tuple, rows().tolist()))))


def run(attention: str, lengths: tuple[int, ...], operator: str = "", first: int = 0, **changes: float) -> RangeTerms:
    """Return the terms of so much of each row, from row `first` on, packed.

    changes: to the attributes that are watched of the second node of `operator`; the polynomials are as they were.
    """
    model = Fuse()(graph(attention).clone()).model
    interpreter = Interpreter(model)
    for name, value in changes.items():
        list(nodes_of_type(model, operator))[1].attributes[name] = ir.AttrFloat32(name, value)
    tokens = torch.cat([row[:length] for row, length in zip(rows()[first:], lengths, strict=False)])[None]
    terms, observer = RangeLoss(model).start(lengths)
    with torch.no_grad():
        interpreter.run(packed_graph_inputs(tokens, lengths), Context(sequences=lengths), observer)
    return terms


RAGGED = (9, *(14,) * 7)


@pytest.mark.parametrize("attention", NAMES)
def test_inside_there_is_no_loss(attention: str) -> None:
    found = run(attention, RAGGED)
    assert float(found.range_term) == float(found.variance_term) == 0.0


@pytest.mark.parametrize(
    ("attention", "operator", "changes"),
    [
        ("gaussian_kernel", "GaussianAttention", {"domain_lower": -0.01}),
        ("power", "PowerAttention", {"domain_upper": 0.01}),
        ("power", "PowerAttention", {"ratio_upper": 2e-3}),
        ("chebyshev", "ChebyshevAttention", {"domain_lower": -0.01}),
        ("power", "PolynomialSiLU", {"domain_upper": 0.01}),
    ],
)  # fmt: skip
def test_outside_there_is(attention: str, operator: str, changes: dict[str, float]) -> None:
    found = run(attention, RAGGED, operator, **changes)
    assert float(found.range_term) > 0 and float(found.variance_term) == 0
    assert float(found.loss(2.0, 5.0)) == pytest.approx(2 * float(found.range_term))


def test_variances_have_a_term_of_their_own() -> None:
    found = run("power", RAGGED, "PolynomialRMSNorm", domain_upper=1e-3)
    assert float(found.variance_term) > 0 and float(found.range_term) == 0


def test_sequences_count_by_their_positions_whatever_is_packed_with_them() -> None:
    def term(*lengths: int, first: int = 0) -> float:
        return float(run("gaussian_kernel", lengths, "GaussianAttention", first, domain_lower=-0.5).range_term)

    alone = term(14), term(7, first=1)
    assert min(alone) > 0
    assert term(14, 7) == pytest.approx((14 * alone[0] + 7 * alone[1]) / 21, rel=1e-5)
