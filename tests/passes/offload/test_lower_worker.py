"""The lowering of an encrypted linear: its text, its meaning, what it leaves alone and what it refuses."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hecompile.bundles.circuit_reference import encrypted_linear_reference
from hecompile.errors import LegalityError
from hecompile.graph.ir import ORIGIN, add_initializer, print_model
from hecompile.passes.offload.lower_worker import LowerWorker
from hecompile.plan.encrypted_linear import MAX_FEATURES_IN, encrypted_linear_model
from hecompile.runtime.worker.engines.onnxruntime_engine import signed_product_is_exact, with_unsigned_weights
from hecompile.word_sizes import bytes_of, unused_bits
from tests.conftest import Golden
from tests.support.bundles import extreme_planes, extreme_weight


def run_lowered(model: ir.Model, planes: np.ndarray) -> np.ndarray:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    serialized = proto.SerializeToString() if signed_product_is_exact() else with_unsigned_weights(proto)
    session = onnxruntime.InferenceSession(serialized, providers=["CPUExecutionProvider"])
    return session.run(None, {"ciphertext": planes})[0]


def test_golden(golden: Golden) -> None:
    weight = np.array([[1, -2], [3, 4], [-128, 127]], dtype=np.int8)
    model = encrypted_linear_model(weight, 24, 16, "layer.forward")
    result = LowerWorker()(model)
    assert result.modified
    golden.check("lower_worker", print_model(result.model))
    planes = extreme_planes(3, 5, 3)
    np.testing.assert_array_equal(run_lowered(result.model, planes), encrypted_linear_reference(planes, weight, 16))


@settings(max_examples=40, deadline=None)
@given(
    limbs=st.integers(1, 4),
    data=st.data(),
    in_features=st.integers(1, 9),
    out_features=st.integers(3, 6),
    tokens=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_reference_is_the_wire_semantics_in_python_integers(
    limbs: int, data: st.DataObject, in_features: int, out_features: int, tokens: int, seed: int
) -> None:
    reply_bits = data.draw(st.integers(8, 8 * limbs))
    weight, planes = extreme_weight(in_features, out_features, seed), extreme_planes(limbs, tokens, in_features, seed)
    reply = encrypted_linear_reference(planes, weight, reply_bits)
    modulus, dropped = 2 ** (8 * limbs), 8 * limbs - reply_bits
    for t in range(tokens):
        words = [int.from_bytes(bytes(planes[:, t, j].tolist()), "little") for j in range(in_features)]
        for i in range(out_features):
            exact = sum(int(weight[j, i]) * word for j, word in enumerate(words)) % modulus
            rounded = ((exact + (2**dropped // 2)) % modulus) >> dropped
            assert int.from_bytes(bytes(reply[:, t, i].tolist()), "little") == rounded << unused_bits(reply_bits)


def test_every_node_says_its_origin() -> None:
    lowered = LowerWorker()(encrypted_linear_model(extreme_weight(4, 3), 32, 24, "a.b.backward")).model
    assert {node.metadata_props[ORIGIN] for node in lowered.graph} == {"a.b.backward"}
    assert dict(lowered.opset_imports) == {"": 18}


def test_lowered_model_is_left_alone() -> None:
    lowered = LowerWorker()(encrypted_linear_model(extreme_weight(4, 3), 16, 8, "a.forward")).model
    before = print_model(lowered)
    result = LowerWorker()(lowered)
    assert not result.modified
    assert print_model(result.model) == before


def test_widest_inner_dimension_is_exact_and_one_more_is_refused() -> None:
    assert MAX_FEATURES_IN == 65793 and 255 * 128 * MAX_FEATURES_IN < 2**31 <= 255 * 128 * (MAX_FEATURES_IN + 1)
    weight = np.full((MAX_FEATURES_IN, 1), -128, dtype=np.int8)
    planes = np.full((2, 1, MAX_FEATURES_IN), 255, dtype=np.uint8)
    lowered = LowerWorker()(encrypted_linear_model(weight, 16, 16, "wide.forward")).model
    np.testing.assert_array_equal(run_lowered(lowered, planes), encrypted_linear_reference(planes, weight, 16))
    weight = np.full((MAX_FEATURES_IN + 1, 1), -128, dtype=np.int8)
    expect_illegal(encrypted_linear_model(weight, 16, 16, "wide.forward"), "wide.forward: 65794 input features")


def expect_illegal(model: ir.Model, message: str) -> None:
    with pytest.raises(ir.passes.PreconditionError) as caught:
        LowerWorker()(model)
    assert isinstance(caught.value.__cause__, LegalityError)
    assert message in str(caught.value.__cause__)


@pytest.mark.parametrize(("upload_bits", "reply_bits"), [(33, 24), (16, 17), (16, 7), (0, 0)])
def test_bits_out_of_range_are_refused(upload_bits: int, reply_bits: int) -> None:
    model = encrypted_linear_model(extreme_weight(4, 3), upload_bits, reply_bits, "a.forward")
    expect_illegal(model, f"a.forward: upload_bits {upload_bits}, reply_bits {reply_bits}")


@pytest.mark.parametrize(("upload_bits", "reply_bits"), [(22, 12), (22, 22), (32, 9)])
def test_bits_that_fill_no_bytes_are_zero(upload_bits: int, reply_bits: int) -> None:
    weight, planes = extreme_weight(7, 5), extreme_planes(bytes_of(upload_bits), 3, 7)
    planes[0] &= 255 << unused_bits(upload_bits) & 255
    lowered = LowerWorker()(encrypted_linear_model(weight, upload_bits, reply_bits, "a.forward")).model
    reply = run_lowered(lowered, planes)
    np.testing.assert_array_equal(reply, encrypted_linear_reference(planes, weight, reply_bits))
    assert not (reply[0] & (1 << unused_bits(reply_bits)) - 1).any()


def test_weight_that_is_not_constant_is_refused() -> None:
    model = encrypted_linear_model(extreme_weight(4, 3), 24, 24, "a.forward")
    model.graph.initializers["weight"].const_value = None
    expect_illegal(model, "must be a constant int8")


def test_ciphertext_that_does_not_fit_is_refused() -> None:
    model = encrypted_linear_model(extreme_weight(4, 3), 24, 24, "a.forward")
    model.graph.inputs[0].shape = ir.Shape([3, "T", 5])
    expect_illegal(model, "does not fit 3 limbs and weight [4,3]")


@pytest.mark.parametrize("weight", [np.zeros((2, 2), np.int32), np.zeros(4, np.int8), np.zeros((0, 2), np.int8)])
def test_builder_refuses_other_weights(weight: np.ndarray) -> None:
    with pytest.raises(LegalityError, match="needs int8"):
        encrypted_linear_model(weight, 24, 24, "a.forward")


def test_a_float_tensor_in_a_worker_circuit_is_illegal() -> None:
    model = encrypted_linear_model(extreme_weight(4, 3), 24, 24, "a.forward")
    add_initializer(model.graph, "scale", np.ones(3, dtype=np.float32))
    with pytest.raises(ir.passes.PostconditionError) as caught:
        LowerWorker()(model)
    assert "value scale has FLOAT; only integers are exact" in str(caught.value.__cause__)


@pytest.mark.parametrize("dtype", [np.int8, np.int16])
def test_unsigned_weights_are_the_same_circuit(dtype: type[np.signedinteger]) -> None:
    """What is run where the processor has no VNNI, run whatever this one has; one weight serves several products."""
    weight = np.array([[127, -128, 5], [127, 127, -6], [-128, -128, 0]], dtype=np.int8).astype(dtype)
    if dtype is np.int16:
        weight[0] = 32000, -32768, 300
    proto = ir.to_proto(LowerWorker()(encrypted_linear_model(weight, 24, 16, "layer.forward")).model)
    planes = extreme_planes(3, 4, 3)
    before = proto.SerializeToString()
    session = onnxruntime.InferenceSession(with_unsigned_weights(proto), providers=["CPUExecutionProvider"])
    assert proto.SerializeToString() != before
    assert not any(tensor.data_type == onnx.TensorProto.INT8 for tensor in proto.graph.initializer)
    reply = session.run(None, {"ciphertext": planes})[0]
    np.testing.assert_array_equal(reply, encrypted_linear_reference(planes, weight, 16))
