"""Marking values public or secret: text, what stays public, what is refused."""

from __future__ import annotations

import torch

from hecompile.errors import LegalityError
from hecompile.graph.ir import print_model
from tests.conftest import Golden
from tests.support.graphs import evaluate, integers, parse, refused, run_pass

TEXT = """
model (int64[B,S] input_ids, float[B,1,S,S] attention_bias, int64[B,S] position_ids, float[2,2] lora) => (float[B,S,2] y)
<float[4,2] table = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0}, float[2,1] w = {1.0, -1.0}, int64[1] last = {2}>
{
    x = Gather <axis: int = 0> (table, input_ids)
    positions = Cast <to: int = 1> (position_ids)
    angle = Cos (positions)
    angles = Unsqueeze (angle, last)
    two = Constant <value_float: float = 2.0> ()
    doubled = Mul (angles, two)
    plain = hecompile.Linear (doubled, w)
    turned = Add (x, plain)
    y = MatMul (turned, lora)
}
"""


def test_golden(golden: Golden) -> None:
    model = parse(TEXT)
    inputs = {
        "input_ids": torch.tensor([[0, 3]]), "attention_bias": torch.zeros(1, 1, 2, 2),
        "position_ids": torch.tensor([[0, 1]]), "lora": integers(2, 2),
    }  # fmt: skip
    before = evaluate(model, **inputs)
    result = run_pass(model, "annotate_secrecy")
    assert result.modified
    golden.check("annotate_secrecy", print_model(result.model))
    assert torch.equal(evaluate(result.model, **inputs), before)


def test_untouched_when_every_value_is_marked() -> None:
    model = run_pass(parse(TEXT), "annotate_secrecy").model
    before = print_model(model)
    result = run_pass(model, "annotate_secrecy")
    assert not result.modified
    assert print_model(result.model) == before


def test_refused_result_that_depends_on_no_secret() -> None:
    model = parse("g (float[2] position_ids, float[2] x) => (float[2] y) { z = Neg (x)\n y = Cos (position_ids) }")
    error = refused(model, "annotate_secrecy")
    assert isinstance(error, LegalityError)
    assert "pass annotate_secrecy: the graph output y does not depend on any secret" in str(error)


def test_boundary_one_secret_among_public_inputs_makes_all_results_secret() -> None:
    model = parse(
        """g (float[4] position_ids, float[4] x) => (float[4] y) <int64[2] sizes = {2, 2}>
        { joined = Concat <axis: int = 0> (position_ids, x)
          a, b = Split <axis: int = 0> (joined, sizes)
          c = Cos (position_ids)
          y = Concat <axis: int = 0> (a, b) }"""
    )
    text = print_model(run_pass(model, "annotate_secrecy").model)
    assert "%a: ?[?] !secret, %b: ?[?] !secret = Split" in text
    assert "%c: ?[?] !public = Cos" in text
