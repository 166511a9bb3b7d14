"""Storing matrices in 16 bits: text and values, which do not change, and what is not narrowed."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch

from hecompile.graph.interpreter import Interpreter
from hecompile.graph.ir import print_model
from hecompile.graph.legality import CLIENT_PLAN
from tests.conftest import Golden
from tests.support.graphs import parse, run_pass

TEXT = """
tied (int64[B,S] ids) => (float[B,S,3] logits)
<float[3,2] table = {1.5, -2.0, 0.25, 3.0, %s, 1.0}, float[3,2] unread = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}>
{
    rows = Gather (table, ids)
    more = Add (rows, rows)
    logits = hecompile.Linear (more, table)
}
"""
IDS = torch.tensor([[0, 2, 1]])


def logits(model: ir.Model) -> torch.Tensor:
    (value,) = Interpreter(model).run({"ids": IDS}).values()
    return value


def test_golden(golden: Golden) -> None:
    model = parse(TEXT % "100.0")
    before = logits(model)
    result = run_pass(model, "narrow", CLIENT_PLAN, elements=1)
    assert result.modified and not run_pass(result.model, "narrow", CLIENT_PLAN, elements=1).modified
    golden.check("narrow", print_model(result.model))
    assert torch.equal(logits(result.model), before) and before.dtype == torch.float32


@pytest.mark.parametrize(("value", "dtype"), [(1 + 2**-7, "BFLOAT16"), (2.0**100, "BFLOAT16"), (1 + 2**-10, "FLOAT16")])
def test_the_type_is_one_that_has_every_value(value: float, dtype: str) -> None:
    model = parse(TEXT % repr(value))
    before = logits(model)
    run_pass(model, "narrow", CLIENT_PLAN, elements=1)
    assert model.graph.initializers["table"].dtype == ir.DataType[dtype]
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(("value", "elements"), [(float(np.float32(0.1)), 1), (100.0, 7)])
def test_untouched_where_a_value_needs_more_bits_or_the_matrix_is_small(value: float, elements: int) -> None:
    model = parse(TEXT % repr(value))
    before = print_model(model)
    assert not run_pass(model, "narrow", CLIENT_PLAN, elements=elements).modified
    assert print_model(model) == before
