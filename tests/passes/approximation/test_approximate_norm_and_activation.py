"""RMSNorm and SiLU by polynomials: text, meaning, domains and refusals."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F

from hecompile.errors import InputError, LegalityError
from hecompile.graph.ir import attributes_of
from hecompile.graph.legality import CANONICAL
from hecompile.passes.approximation.approximate_rmsnorm import ApproximateRMSNorm
from hecompile.passes.approximation.approximate_silu import ApproximateSiLU
from hecompile.polynomial.ranges import Interval, check_domain, write_range
from tests.conftest import Golden
from tests.support.graphs import evaluate, gaussian, parse, refused, run_pass

NORM = """
norm (float[B,8] x) => (float[B,8] y)
<float[8] w = {1.0, 2.0, 0.5, 1.0, -1.0, 1.0, 0.25, 3.0}>
{ y = hecompile.RMSNorm <epsilon = 0.001> (x, w) }
"""
SILU = "act (float[B,8] x) => (float[B,8] y) { y = hecompile.SiLU (x) }"


def graph(text: str, seen: Interval | None) -> ir.Model:
    model = parse(text, {"y": "model.layers.0.mlp"})
    if seen is not None:
        write_range(next(iter(model.graph)).outputs[0], seen)
    return model


def described(model: ir.Model) -> str:
    (node,) = model.graph
    lines = [f"{node.op_type}\n"]
    for name, value in sorted(attributes_of(node).items()):
        rounded = [f"{x:.3g}" for x in value] if isinstance(value, (list, tuple)) else f"{value:.3g}"
        lines.append(f"  {name} = {rounded}\n")
    return "".join(lines)


def outlined(model: ir.Model) -> str:
    """Operator, domain and how many polynomials of which degree. The composed form is the result of a search, whose digits
    differ between machines: its coefficients and bound are not in the text."""
    (node,) = model.graph
    given = attributes_of(node)
    count = len(given["coefficients"]) // 4
    lines = [
        f"%{node.outputs[0].name} = {node.op_type}({node.inputs[0].name if node.inputs[0] else ''})",
        f"  attributes = {', '.join(sorted(given))}",
        f"  domain = [{given['domain_lower']:.3g}, {given['domain_upper']:.3g}]",
        f"  sign = {' of '.join(f'p{number}' for number in range(count, 0, -1))}, odd polynomials of degree 7",
    ]
    return "\n".join(lines) + "\n"


def test_golden_rmsnorm(golden: Golden) -> None:
    model = graph(NORM, Interval(0.1, 2.0))
    # Rows whose variance covers what was seen and the margin of 2 around it, edges included.
    rows = gaussian(64, 8, seed=1)
    rows = rows / rows.square().mean(-1, keepdim=True).sqrt() * torch.linspace(0.05, 4.0, 64)[:, None].sub(0.001).sqrt()
    exact = evaluate(model, x=rows)
    result = run_pass(model, "approximate_rmsnorm", CANONICAL)
    assert result.modified
    golden.check("approximate_rmsnorm", described(result.model))
    (node,) = result.model.graph
    bound = attributes_of(node)["error_bound"]
    assert 0 < bound <= 1e-3
    relative = ((evaluate(result.model, x=rows) - exact).norm(dim=1) / exact.norm(dim=1)).max()
    assert bound / 4 < float(relative) <= bound + 2e-6
    assert not run_pass(result.model, "approximate_rmsnorm", CANONICAL).modified


@pytest.mark.parametrize("form", ["series", "composed"])
def test_golden_silu(golden: Golden, form: str) -> None:
    model = graph(SILU, Interval(-4.0, 6.0))
    x = torch.linspace(-9.0, 9.0, 8 * 101).reshape(-1, 8)
    result = run_pass(model, "approximate_silu", CANONICAL, form=form)
    assert result.modified
    if form == "series":
        golden.check("approximate_silu", described(result.model))
    else:
        golden.check("approximate_silu_composed", outlined(result.model))
    (node,) = result.model.graph
    given = attributes_of(node)
    assert given["domain_upper"] == 9.0 == -given["domain_lower"]
    assert 0 < given["error_bound"] <= 1e-2
    error = float((evaluate(result.model, x=x) - F.silu(x)).abs().max())
    assert given["error_bound"] / 4 < error <= given["error_bound"] + 1e-5
    assert not run_pass(result.model, "approximate_silu", CANONICAL).modified


@pytest.mark.parametrize(
    ("text", "name", "seen", "options", "words"),
    [
        (NORM, "approximate_rmsnorm", None, {}, ("run calibrate",)),
        (NORM, "approximate_rmsnorm", (0.1, 2.0), {"domain_lower": 0.2, "domain_upper": 3.0}, ("0.1", "[0.2, 3]")),
        (NORM, "approximate_rmsnorm", (0.1, 2.0), {"domain_lower": 0.05, "domain_upper": 1.0}, ("[0.05, 1]",)),
        (NORM, "approximate_rmsnorm", (1e-6, 2.0), {"max_degree": 4}, ("a factor of 4e+03", "degree above 4")),
        (NORM, "approximate_rmsnorm", (0.0, 0.0), {}, ("zeros only",)),
        (SILU, "approximate_silu", None, {}, ("run calibrate",)),
        (SILU, "approximate_silu", (-4.0, 6.0), {"domain_upper": 5.0}, ("between -4 and 6", "[-5, 5]")),
        (SILU, "approximate_silu", (-4.0, 6.0), {"form": "composed", "domain_upper": 5.0}, ("between -4 and 6", "[-5, 5]")),
        (SILU, "approximate_silu", None, {"form": "composed"}, ("run calibrate",)),
        (SILU, "approximate_silu", (-40.0, 60.0), {"max_degree": 8}, ("degree above 8", "[-90, 90]")),
        (SILU, "approximate_silu", (-4e3, 6e3), {"form": "composed", "error": 1e-4}, ("more than 4 composed",)),
    ],
)
def test_refused(
    text: str, name: str, seen: tuple[float, float] | None, options: dict[str, float], words: tuple[str, ...]
) -> None:
    error = refused(graph(text, None if seen is None else Interval(*seen)), name, CANONICAL, **options)
    assert isinstance(error, LegalityError)
    assert "model.layers.0.mlp" in str(error)
    for word in words:
        assert word in str(error)


def test_boundary_a_domain_that_ends_where_calibration_does() -> None:
    assert run_pass(graph(SILU, Interval(-4.0, 6.0)), "approximate_silu", CANONICAL, domain_upper=6.0).modified
    options = {"domain_lower": 0.1, "domain_upper": 2.0}
    assert run_pass(graph(NORM, Interval(0.1, 2.0)), "approximate_rmsnorm", CANONICAL, **options).modified


@pytest.mark.parametrize(
    ("text", "name", "seen", "options", "later", "words"),
    [
        (SILU, "approximate_silu", (-4.0, 6.0), {}, (-4.0, 9.5), "between -4 and 9.5, outside the domain [-9, 9]"),
        (SILU, "approximate_silu", (-4.0, 6.0), {"form": "composed"}, (-9.5, 6.0), "outside the domain [-9, 9]"),
        (NORM, "approximate_rmsnorm", (0.1, 2.0), {}, (0.04, 2.0), "between 0.04 and 2, outside the domain [0.05, 4]"),
        (NORM, "approximate_rmsnorm", (0.1, 2.0), {}, (0.1, 4.5), "between 0.1 and 4.5, outside the domain [0.05, 4]"),
    ],
)
def test_calibration_after_the_fact_refuses_a_domain_that_does_not_cover_it(
    text: str, name: str, seen: tuple[float, float], options: dict[str, str], later: tuple[float, float], words: str
) -> None:
    model = run_pass(graph(text, Interval(*seen)), name, CANONICAL, **options).model
    (node,) = model.graph
    write_range(node.outputs[0], Interval(*seen))
    check_domain(node)
    write_range(node.outputs[0], Interval(*later))
    with pytest.raises(LegalityError) as caught:
        check_domain(node)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (ApproximateRMSNorm, {"error": 1.0}),
        (ApproximateRMSNorm, {"domain_lower": 1.0}),
        (ApproximateRMSNorm, {"domain_lower": 0.0, "domain_upper": 1.0}),
        (ApproximateSiLU, {"form": "relu"}),
        (ApproximateSiLU, {"error": 0.0}),
        (ApproximateSiLU, {"domain_upper": 0.0}),
    ],
)
def test_options_out_of_range(kind: type, options: dict[str, object]) -> None:
    with pytest.raises(InputError):
        kind(**options)
