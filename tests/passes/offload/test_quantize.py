"""Quantisation: text, the error bound, what is left alone, what is refused, and rows at the edge."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch

from hecompile.compiler.pipeline import PASSES
from hecompile.errors import InputError
from hecompile.graph.ir import SAMPLES, WEIGHT_BITS, print_model
from hecompile.passes.offload.quantize import quantize_weight
from tests.conftest import Golden
from tests.support.graphs import evaluate, gaussian, parse, refused, run_pass
from tests.support.tiny import coarse

TEXT = """
model (float[B,S,3] x) => (float[B,S,2] y)
<float[2,3] w = {1.0, -2.54, 0.0, 0.0, 0.0, 0.0}, float[2,2] head = {1.0, 2.0, 3.0, 4.0}>
{
    hidden = hecompile.Linear (x, w)
    y = hecompile.Linear (hidden, head)
}
"""
PATH = "model.layers.0.mlp.up_proj"


def model_with(first: str = PATH) -> ir.Model:
    return parse(TEXT, {"hidden": first, "y": "lm_head"})


def test_golden(golden: Golden) -> None:
    """Scale 2.54/127 = 0.02 makes 1.0 exactly 50 steps: the outputs differ by float32 rounding alone, 1e-5."""
    model, x = model_with(), gaussian(2, 3, 3)
    before = evaluate(model, x=x)
    result = run_pass(model, "quantize")
    assert result.modified
    golden.check("quantize", print_model(result.model))
    torch.testing.assert_close(evaluate(result.model, x=x), before, rtol=0, atol=1e-5)


def test_golden_of_more_than_8_bits(golden: Golden) -> None:
    """Scale 2.54/511: half a step is 0.0025, and |x| < 3 here."""
    model, x = model_with(), gaussian(2, 3, 3)
    before = evaluate(model, x=x)
    assert run_pass(model, "quantize", bits=10).modified
    golden.check("quantize_10_bits", coarse(print_model(model)))
    torch.testing.assert_close(evaluate(model, x=x), before, rtol=0, atol=0.0025 * 9 * 4)


@pytest.mark.parametrize("bits", [7, 13, 0])
def test_refused_bits(bits: int) -> None:
    with pytest.raises(InputError, match=f"weights can have 8, 9, 10, 11, 12 bits, got {bits}"):
        PASSES["quantize"](bits=bits)


def test_the_output_error_is_within_half_a_step_per_input() -> None:
    weight, x = gaussian(5, 16), gaussian(7, 16, seed=1)
    quantized, scale = (torch.from_numpy(array) for array in quantize_weight(weight.numpy()))
    error = (x @ quantized.float().T * scale - x @ weight.T).abs()  # [7, 5]
    bound = x.abs().sum(dim=1, keepdim=True) * scale / 2 + 1e-5
    assert bool((error <= bound).all())
    assert float((error / bound).max()) > 0.1


def test_samples_of_the_input_decide_the_rounding_and_are_let_go_of() -> None:
    """1.004 and 0.504 are 50.2 and 25.2 steps, 0.4 too much for 50 and 25: with (1, 1, 0) that is made up for elsewhere."""
    model = model_with()
    (node, _) = model.graph
    weight = np.array([[1.004, 0.504, 2.54], [1.004, 0.504, 2.54]], dtype=np.float32)
    node.inputs[1].const_value = ir.Tensor(weight, name="w")
    node.inputs[0].meta[SAMPLES] = torch.tensor([[1.0, 1.0, 0.0]] * 4)
    run_pass(model, "quantize", include_head=True)
    quantized = model.graph.initializers[f"{PATH}.weight_int8"].const_value.numpy()
    assert quantized.tolist() == [[50, 25, 127]] * 2
    assert not any(value.meta for n in model.graph for value in (*n.inputs, *n.outputs))


@pytest.mark.parametrize(("chosen", "dtype"), [("8", "int8"), ("12", "int16")])
def test_chosen_bits_come_before_those_of_all(chosen: str, dtype: str) -> None:
    model = model_with()
    model.graph.node(0).metadata_props[WEIGHT_BITS] = chosen
    run_pass(model, "quantize", bits=10)
    assert f"{PATH}.weight_{dtype}" in model.graph.initializers
    integers = model.graph.initializers[f"{PATH}.weight_{dtype}"].const_value.numpy()
    assert int(np.abs(integers).max()) == 2 ** (int(chosen) - 1) - 1


def test_include_head_quantizes_the_head_too() -> None:
    model = model_with()
    run_pass(model, "quantize", include_head=True)
    assert "hecompile.QuantizedLinear(%hidden, %lm_head.weight_int8, %lm_head.weight_scale)" in print_model(model)


def test_untouched_outside_the_decoder_layers() -> None:
    model = model_with("model.projector")
    before = print_model(model)
    result = run_pass(model, "quantize")
    assert not result.modified
    assert print_model(result.model) == before


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_refused_weight_is_named(value: float) -> None:
    model = model_with()
    damaged = np.array([[1, 2, 3], [4, value, 6]], dtype=np.float32)
    model.graph.initializers["w"].const_value = ir.Tensor(damaged)
    error = refused(model, "quantize")
    assert isinstance(error, InputError)
    assert str(error) == f"the weight of {PATH} holds values that are not finite; the checkpoint is damaged"


def test_boundary_rows() -> None:
    largest, tiny = np.finfo(np.float32).max, np.float32(1e-44)
    rows = [[127, -127, 63.5, 64.5], [0, 0, 0, 0], [largest, -largest, 0, 0], [128 * tiny, -128 * tiny, tiny, 0]]
    quantized, scale = quantize_weight(np.array(rows, dtype=np.float32))
    assert quantized[0].tolist() == [127, -127, 64, 64]  # ties to even
    assert quantized[1].tolist() == [0, 0, 0, 0] and scale[1] == 0
    assert quantized[2].tolist() == [127, -127, 0, 0]
    assert quantized[3].tolist() == [0, 0, 0, 0] and scale[3] == 0  # too small for a scale of full precision
