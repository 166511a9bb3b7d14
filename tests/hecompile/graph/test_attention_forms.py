"""Attention with windows and caps: found as exported, and the same packed, cached and in one piece."""

from __future__ import annotations

import math

import pytest
import torch

from hecompile.errors import LegalityError
from hecompile.graph.attention_cache import AttentionCache, causal_mask
from hecompile.graph.interpreter import Interpreter, causal_attention_bias
from hecompile.graph.ir import WINDOW, attributes_of
from hecompile.graph.matching import attentions, require_matched_attention, softmax_attentions
from hecompile.graph.operators import Context
from hecompile.passes.offload.fuse import Fuse
from tests.support.graphs import evaluate, gaussian, parse

HEAD = "g (float[B,2,S,4] q, float[B,2,S,4] k, float[B,2,S,4] v, float[B,1,S,S] bias) => (float[B,2,S,4] y)"
BEGIN = " <float half = {0.5}, float cap = {2.0}> { t = Transpose <perm = [0, 1, 3, 2]> (k)\n s0 = MatMul (q, t)\n "
END = "\n b = Add (scores, bias)\n w = Softmax <axis = -1> (b)\n y = MatMul (w, v) }"
SCORES = {
    "scaled": ("scores = Mul (s0, half)", {"scale": 0.5}),
    "bare": ("scores = Identity (s0)", {"scale": 1.0}),
    "capped": (
        "s1 = Mul (s0, half)\n s2 = Div (s1, cap)\n s3 = Tanh (s2)\n scores = Mul (s3, cap)", {"scale": 0.5, "cap": 2.0},
    ),
    "capped alone": ("s2 = Div (s0, cap)\n s3 = Tanh (s2)\n scores = Mul (s3, cap)", {"scale": 1.0, "cap": 2.0}),
}  # fmt: skip
LENGTHS = (6, 3)


def inputs(seed: int) -> dict[str, torch.Tensor]:
    return {name: 2 * gaussian(1, 2, sum(LENGTHS), 4, seed=seed + number) for number, name in enumerate("qkv")}


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("form", SCORES)
def test_forms(form: str, window: int | None) -> None:
    scores, wanted = SCORES[form]
    text = (HEAD + BEGIN + scores + END).replace("scores = Identity (s0)", "").replace(
        "Add (scores, bias)", "Add (s0, bias)" if form == "bare" else "Add (scores, bias)"
    )
    model = parse(text)
    if window is not None:
        model.graph.inputs[-1].metadata_props[WINDOW] = str(window)
        wanted = wanted | {"window": window}
    assert len(list(softmax_attentions(model))) == 1
    assert len(list(attentions(model))) == (1 if window is None and "cap" not in wanted else 0)
    require_matched_attention(model, ("bias",))
    given, parts = inputs(1), []
    for start, end in ((0, 6), (6, 9)):
        part = {name: value[:, :, start:end] for name, value in given.items()}
        bias = causal_attention_bias(torch.ones(1, end - start, dtype=torch.int64), window)
        parts.append(evaluate(model, bias=bias, **part))
    expected = torch.cat(parts, dim=2)
    fused = Fuse()(model).model
    (node,) = fused.graph
    assert node.op_type == "Attention" and attributes_of(node) == wanted
    placeholder = torch.zeros(1, 1, 1, 1)
    packed = evaluate(fused, Context(sequences=LENGTHS), bias=placeholder, **given)
    torch.testing.assert_close(packed, expected, rtol=1e-5, atol=1e-6)
    cache, interpreter, later = AttentionCache(), Interpreter(fused), []
    for counts, offset in (((4, 1), (0, 0)), ((1, 1), (4, 1)), ((1, 1), (5, 2))):
        cache.begin(("a", "b"))
        rows = [slice(s + o, s + o + n) for s, o, n in zip((0, 6), offset, counts, strict=True)]
        piece = {name: torch.cat([value[:, :, row] for row in rows], dim=2) for name, value in given.items()}
        context = Context(sequences=counts, cache=cache)
        (result,) = interpreter.run({**piece, "bias": placeholder}, context).values()
        later.append(result[:, :, : counts[0]])
    torch.testing.assert_close(torch.cat(later, dim=2), expected[:, :, :6], rtol=1e-5, atol=1e-6)


def test_the_mask_of_a_window() -> None:
    assert causal_mask(2, 4, 2).tolist() == [[False, True, True, False], [False, False, True, True]]
    bias = causal_attention_bias(torch.tensor([[1, 1, 0]]), 1)
    assert (bias[0, 0] == 0).tolist() == torch.eye(3, dtype=torch.bool).tolist() and math.isfinite(float(bias.min()))


@pytest.mark.parametrize("op", ["Sub (scores, bias)", "Mul (scores, bias)"])
def test_an_attention_of_another_form_is_refused(op: str) -> None:
    model = parse((HEAD + BEGIN + SCORES["scaled"][0] + END).replace("Add (scores, bias)", op))
    with pytest.raises(LegalityError, match="1 attentions of this model have a form that is not known"):
        require_matched_attention(model, ("bias",))
