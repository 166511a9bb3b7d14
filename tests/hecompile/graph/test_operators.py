"""Standard operators that families of models are exported with: values of ONNX Runtime, gradients of differences."""

from __future__ import annotations

import onnx_ir as ir
import onnxruntime
import pytest
import torch

from hecompile.graph.legality import CLIENT_PLAN, check_stage
from tests.support.graphs import evaluate, gaussian, parse

TEXTS = {
    "Pow": "y = Pow (x, three)",
    "Sqrt": "p = Mul (x, x)\n y = Sqrt (p)",
    "Reciprocal": "y = Reciprocal (x)",
    "ReduceMean": "y = ReduceMean <keepdims: int = 1> (x, last)",
    "Sigmoid": "y = Sigmoid (x)",
    "Tanh": "y = Tanh (x)",
    "Erf": "y = Erf (x)",
    "Relu": "y = Relu (x)",
    "Gelu": "y = Gelu (x)",
    "Gelu of tanh": 'y = Gelu <approximate = "tanh"> (x)',
    "LayerNormalization": "y = LayerNormalization <axis = -1, epsilon = 0.25> (x, gain, shift)",
    "LayerNormalization without a shift": "y = LayerNormalization <axis = -1> (x, gain)",
    "TopK": "y, places = TopK <axis: int = -1> (x, two)",
    "ScatterElements": "v, places = TopK <axis: int = -1> (x, two)\n w = Mul (v, v)\n y = ScatterElements <axis: int = -1> "
    "(x, places, w)",
    "ReduceSum": "y = ReduceSum <keepdims: int = 1> (x, last)",
    "Split": "y, rest = Split <axis: int = -1> (x, sizes)",
}


@pytest.mark.parametrize("name", TEXTS)
def test_value_and_gradient(name: str) -> None:
    model = parse(
        f"""g (float[2,3,4] x) => (float[?,?,?] y) <float three = {{3.0}}, int64[1] last = {{-1}},
        float[4] gain = {{1.0, 2.0, -1.0, 0.5}}, float[4] shift = {{0.5, 0.0, 1.0, -2.0}},
        int64[2] sizes = {{1, 3}}, int64[1] two = {{2}}>
        {{ {TEXTS[name]} }}"""
    )
    check_stage(model, CLIENT_PLAN)
    del model.opset_imports["hecompile"]
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    x = gaussian(2, 3, 4) + 0.1
    (expected,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(evaluate(model, x=x), torch.from_numpy(expected), rtol=1e-5, atol=1e-6)
    model.graph.initializers["three"].const_value = ir.tensor(torch.tensor(3.0).double().numpy(), name="three")
    for each in ("gain", "shift"):
        value = model.graph.initializers[each]
        value.const_value = ir.tensor(value.const_value.numpy().astype("float64"), name=each)
    assert torch.autograd.gradcheck(lambda given: evaluate(model, x=given), x.double().requires_grad_())
