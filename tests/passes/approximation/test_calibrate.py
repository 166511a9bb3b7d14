"""Calibration: the ranges of a graph that can be worked out by hand, and what it refuses."""

from __future__ import annotations

import json
import math

import onnx_ir as ir
import pytest
import torch

from hecompile.errors import InputError
from hecompile.graph.ir import GRADIENT_PEAK, GRADIENT_RANGE, RANGE, print_model
from hecompile.graph.legality import ADAPTED
from hecompile.plan.circuits import MOST_OUTPUTS, parts_of
from tests.conftest import Golden
from tests.support.graphs import evaluate, parse, refused, run_pass

# Token 0 → (3, 4), token 1 → (0, 2), token 2 → (0, 0).
TEXT = """
model (int64[B,S] input_ids) => (float[B,S,3] logits)
<float[3,2] table = {3.0, 4.0, 0.0, 2.0, 0.0, 0.0}, float[3,2] w = {1.0, 0.0, 0.0, -1.0, 0.0, 0.0}>
{
    x = Gather <axis: int = 0> (table, input_ids)
    logits = hecompile.Linear (x, w)
}
"""


def model_text(model: ir.Model) -> str:
    """The printed model, and the ranges of its values."""
    lines = [
        f"%{output.name} {key} {output.metadata_props[key]}\n"
        for node in model.graph
        for output in node.outputs
        for key in (RANGE, GRADIENT_RANGE)
        if key in output.metadata_props
    ]
    return print_model(model) + "".join(lines)


def ranges(model: ir.Model, name: str, key: str) -> dict[str, float]:
    (value,) = [output for node in model.graph for output in node.outputs if output.name == name]
    return json.loads(value.metadata_props[key])


def linear() -> ir.Model:
    return parse(TEXT, {"logits": "lm_head"})


def test_golden(golden: Golden) -> None:
    model, tokens = linear(), torch.tensor([[0, 1]])
    before = evaluate(model, input_ids=tokens)
    result = run_pass(model, "calibrate", ADAPTED, samples=((0, 1),))
    assert result.modified
    golden.check("calibrate", model_text(result.model))
    assert torch.equal(evaluate(model, input_ids=tokens), before)


def test_ranges_are_those_worked_out_by_hand() -> None:
    model = linear()
    run_pass(model, "calibrate", ADAPTED, samples=((0, 1),))
    # Crest² = max² · features / sum of squares, averaged over the tokens (3, 4) and (0, 2).
    x_crest = math.sqrt((16 * 2 / 25 + 4 * 2 / 4) / 2)
    assert ranges(model, "x", RANGE) == {"max": 4.0, "crest": pytest.approx(x_crest, rel=1e-3)}
    y_crest = math.sqrt((16 * 3 / 25 + 4 * 3 / 4) / 2)
    assert ranges(model, "logits", RANGE) == {"max": 4.0, "crest": pytest.approx(y_crest, rel=1e-3)}
    # Position 0 predicts token 1 from the logits (3, -4, 0); the gradient is softmax - onehot. Position 1 predicts
    # nothing: its row of zeros does not count.
    p = torch.softmax(torch.tensor([3.0, -4.0, 0.0]), dim=0) - torch.tensor([0.0, 1.0, 0.0])
    largest, crest = float(p.abs().max()), float(p.abs().max() / p.square().mean().sqrt())
    assert ranges(model, "logits", GRADIENT_RANGE) == {
        "max": pytest.approx(largest, rel=1e-3), "crest": pytest.approx(crest, rel=1e-3),
    }  # fmt: skip


def test_untouched_without_linears() -> None:
    model = parse("g (int64[B,S] input_ids) => (int64[B,S] y) { y = Neg (input_ids) }")
    before = model_text(model)
    result = run_pass(model, "calibrate", ADAPTED, samples=((0, 1),))
    assert not result.modified
    assert model_text(result.model) == before


@pytest.mark.parametrize("samples", [(), ((1,),), ((0, 1), (0, 1, 2)), ((),)], ids=["none", "short", "ragged", "empty"])
def test_refused_samples(samples: tuple[tuple[int, ...], ...]) -> None:
    error = refused(linear(), "calibrate", ADAPTED, samples=samples)
    assert isinstance(error, InputError)
    assert "one or more sequences of one length of at least 2 tokens" in str(error)


def test_boundary_tokens_of_zeros_have_crest_one() -> None:
    model = linear()
    run_pass(model, "calibrate", ADAPTED, samples=((2, 2),))
    assert ranges(model, "x", RANGE) == {"max": 0.0, "crest": 1.0}


def test_boundary_one_live_feature_gives_the_largest_crest() -> None:
    model = linear()
    run_pass(model, "calibrate", ADAPTED, samples=((1, 1),))
    assert ranges(model, "x", RANGE)["crest"] == pytest.approx(math.sqrt(2), rel=1e-3)


def test_the_peak_of_a_wide_head_is_that_of_the_worst_part_of_its_gradient() -> None:
    """The parts without the target have short gradients that all point one way: their peaks are far above the whole's."""
    vocabulary, sample = MOST_OUTPUTS + 8, (0, 1, 2, 1)
    generator = torch.Generator().manual_seed(0)
    table, w = torch.rand(vocabulary, 2, generator=generator), 1 + torch.rand(vocabulary, 2, generator=generator)
    model = parse(TEXT.replace("float[B,S,3]", f"float[B,S,{vocabulary}]"), {"logits": "lm_head"})
    for name, matrix in (("table", table), ("w", w)):
        value = model.graph.initializers[name]
        value.shape, value.const_value = ir.Shape(matrix.shape), ir.Tensor(matrix.numpy(), name=name)
    run_pass(model, "calibrate", ADAPTED, samples=(sample,))
    (x,) = [output for node in model.graph for output in node.outputs if output.name == "x"]
    tokens = torch.tensor(sample)
    gradient = torch.softmax(table[tokens[:-1]] @ w.t(), dim=1) - torch.nn.functional.one_hot(tokens[1:], vocabulary)

    def peak(rows: slice) -> float:
        part, matrix = gradient[:, rows], w[rows]
        return float(((part @ matrix).abs().amax(dim=1) / (part * matrix.amax(dim=1)).norm(dim=1)).max())

    expected = max(map(peak, parts_of(vocabulary)))
    assert float(x.metadata_props[GRADIENT_PEAK]) == pytest.approx(expected, rel=1e-3)
    assert expected > 10 * peak(slice(None))
