"""The circuits of a bundle as a Triton model repository: its layout, what each configuration says, and that it is true."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as triton

from hecompile.bundles.circuit_reference import encrypted_linear_reference
from hecompile.bundles.public_rows import exact_name
from hecompile.bundles.worker import KNOWN_ANSWER, WorkerBundle
from hecompile.compiler.worker_bundle_writer import WorkerBundleWriter
from hecompile.passes.offload.lower_worker import LowerWorker
from hecompile.plan.encrypted_linear import encrypted_linear_model
from hecompile.runtime.worker.engines.onnxruntime_engine import exact_here, signed_product_is_exact
from tests.support.bundles import PLAN_ID, extreme_planes, extreme_weight

SHAPES = {"layers.0.small-linear": (6, 4), "layers.0.large": (300, 256)}
LIMBS, REPLY_BYTES = 3, 2


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> WorkerBundle:
    """Each linear forward, and its exact form, as a plan without stored hints has it."""
    with WorkerBundleWriter(tmp_path_factory.mktemp("repository") / "worker", PLAN_ID) as writer:
        for linear, shape in SHAPES.items():
            name = f"{linear}.forward"
            writer.add(LowerWorker()(encrypted_linear_model(extreme_weight(*shape), 8 * LIMBS, 8 * REPLY_BYTES, name)).model)
            writer.add(LowerWorker()(encrypted_linear_model(extreme_weight(*shape), 32, 32, exact_name(name))).model)
        return writer.commit()


def read_config(folder: Path) -> triton.ModelConfig:
    return text_format.Parse((folder / "config.pbtxt").read_text(), triton.ModelConfig())


def test_every_folder_is_one_model_of_one_version(bundle: WorkerBundle) -> None:
    folders = sorted(path.name for path in (bundle.directory / "circuits").iterdir())
    assert folders == sorted([*(f"{linear}.forward" for linear in SHAPES), KNOWN_ANSWER])
    for folder in (bundle.directory / "circuits").iterdir():
        assert {path.name for path in folder.iterdir()} == {"config.pbtxt", "1"}
        assert (folder / "1" / "model.onnx").is_file()
        assert not any(path.is_symlink() for path in folder.rglob("*"))


def test_the_configuration_is_that_of_the_onnx_file(bundle: WorkerBundle) -> None:
    for folder in (bundle.directory / "circuits").iterdir():
        config = read_config(folder)
        assert (config.name, config.backend, config.platform) == (folder.name, "onnxruntime", "onnxruntime_onnx")
        assert config.max_batch_size == 0 and config.parameters["plan_id"].string_value == PLAN_ID
        graph = onnx.load(folder / "1" / config.default_model_filename, load_external_data=False).graph
        for tensors, values in ((config.input, graph.input), (config.output, graph.output)):
            assert [tensor.name for tensor in tensors] == [value.name for value in values] and len(tensors) == 1
            shape = [d.dim_value or -1 for d in values[0].type.tensor_type.shape.dim]
            assert list(tensors[0].dims) == shape and shape[1] == -1
            assert tensors[0].data_type == triton.TYPE_UINT8
            assert values[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8


def test_onnx_runtime_opens_every_file_where_it_lies(bundle: WorkerBundle) -> None:
    """By itself, as Triton does; exact forms too, whose weight file is that of their circuit."""
    for linear, (in_features, out_features) in SHAPES.items():
        folder = bundle.directory / "circuits" / f"{linear}.forward" / "1"
        for file, limbs, reply_bytes in (("model.onnx", LIMBS, REPLY_BYTES), ("exact.onnx", 4, 4)):
            session = onnxruntime.InferenceSession(folder / file, providers=["CPUExecutionProvider"])
            planes = extreme_planes(limbs, 3, in_features)
            (reply,) = session.run(["reply"], {"ciphertext": planes})
            if not signed_product_is_exact():  # this processor has no VNNI: it opens, but its sums saturate
                session = onnxruntime.InferenceSession(exact_here(folder / file), providers=["CPUExecutionProvider"])
                (reply,) = session.run(["reply"], {"ciphertext": planes})
            weight = extreme_weight(in_features, out_features)
            np.testing.assert_array_equal(reply, encrypted_linear_reference(planes, weight, 8 * reply_bytes))


def test_the_exact_form_has_no_weight_file_and_no_configuration_of_its_own(bundle: WorkerBundle) -> None:
    large, exact = (bundle.circuits[name] for name in ("layers.0.large.forward", "layers.0.large.forward.exact"))
    assert exact.data == large.data is not None
    assert exact.config is None and large.config is not None
    assert len(list(bundle.directory.rglob("weight.bin"))) == 1
    assert WorkerBundle.open(bundle.directory) == bundle
