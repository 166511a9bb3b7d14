"""Writing alike what is exported differently: its text, its meaning, and what is left alone."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch

from hecompile.graph.ir import print_model
from hecompile.graph.legality import CANONICAL, EXPORTED
from tests.conftest import Golden
from tests.support.graphs import evaluate, integers, parse, run_pass
from tests.support.tiny import exported

PATH = "transformer.h.0.attn.c_attn"
CONV1D = """
conv1d (float[batch,sequence,2] x, int64[3] shape) => (float[batch,sequence,3] y)
<float[2,3] w = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}, float[3] b = {0.5, 1.0, -1.0}, int64[2] rows = {-1, 2},
 float[merged,2] flat, float[merged,3] product>
{
    flat = Reshape (x, rows)
    product = Gemm <alpha: float = 1.0, beta: float = 1.0, transA: int = 0, transB: int = 0> (flat, w, b)
    y = Reshape <allowzero: int = 1> (product, shape)
}
"""
PRODUCT = """
product (float[B,S,2] x) => (float[B,S,3] y) <float[2,3] w = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}> { y = MatMul (x, w) }
"""
GAIN = """
gain (float[B,S,2] x) => (float[B,S,2] y) <float[2] w = {0.5, -2.0}, float one = {1.0}>
{
    shifted = Add (w, one)
    y = Mul (x, shifted)
}
"""
SHAPE = {"shape": torch.tensor([2, 3, 3])}
RULES = {"conv1d": (CONV1D, SHAPE), "product": (PRODUCT, {}), "gain": (GAIN, {})}


@pytest.mark.parametrize("name", RULES)
def test_golden(golden: Golden, name: str) -> None:
    text, further = RULES[name]
    model, x = parse(text, {"product": PATH} if name == "conv1d" else {"y": PATH}), integers(2, 3, 2)
    before = evaluate_raw(model, x, further)
    result = run_pass(model, "unify", EXPORTED)
    assert result.modified
    golden.check(f"unify_{name}", print_model(result.model))
    assert torch.equal(evaluate(result.model, x=x, **further), before)
    assert not run_pass(result.model, "unify", EXPORTED).modified
    assert run_pass(result.model, "canonicalize", CANONICAL).model.graph.outputs[0].name == "y"


def evaluate_raw(model: ir.Model, x: torch.Tensor, further: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the graph computes by its definition: a Gemm is the interpreter's in no form."""
    w = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    if model.graph.name == "conv1d":
        return x @ w + torch.tensor([0.5, 1.0, -1.0])
    return x @ w if model.graph.name == "product" else evaluate(model, x=x, **further)


def test_a_sequence_of_parts_becomes_a_split() -> None:
    model = parse(
        "g (float[B,S,6] x) => (float[B,S,2] y) <int64 size = {2}, int64 last = {2}, int64 first = {0}>"
        " { parts = SplitToSequence <axis: int = 2, keepdims: int = 1> (x, size)\n a = SequenceAt (parts, last)\n"
        " b = SequenceAt (parts, first)\n y = Sub (a, b) }"
    )
    assert run_pass(model, "unify", EXPORTED).modified
    assert [node.op_type for node in model.graph] == ["Split", "Sub"]
    x = integers(2, 3, 6)
    assert torch.equal(evaluate(model, x=x), x[..., 4:] - x[..., :2])


UNTOUCHED = {
    "a product of two computed values": "g (float[B,S,3] x, float[B,3,S] z) => (float[B,S,S] y) { y = MatMul (x, z) }",
    "a sum of computed values": "g (float[B] x, float[B] z) => (float[B] y) { y = Add (x, z) }",
    "reshapes that divide the rows otherwise": CONV1D.replace("float[batch,sequence,3] y", "float[sequence,batch,3] y"),
    "a scaled product": CONV1D.replace("alpha: float = 1.0", "alpha: float = 2.0"),
    "a turned product": CONV1D.replace("transA: int = 0", "transA: int = 1"),
}


@pytest.mark.parametrize("text", UNTOUCHED.values(), ids=UNTOUCHED)
def test_untouched(text: str) -> None:
    model = parse(text)
    before = print_model(model)
    assert not run_pass(model, "unify", EXPORTED).modified
    assert print_model(model) == before


def test_a_llama_is_written_so_already() -> None:
    model = run_pass(exported(), "simplify", EXPORTED).model
    assert not run_pass(model, "unify", EXPORTED).modified
