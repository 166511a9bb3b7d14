"""A client bundle that was damaged, changed or mixed up is refused with one error that names what is wrong."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from hecompile.bundles.client import ClientBundle, PlanRecord
from hecompile.bundles.worker import WorkerBundle
from hecompile.compiler.worker_bundle_writer import WorkerBundleWriter
from hecompile.errors import InputError, SecurityError, WorkerError
from hecompile.graph.interpreter import Interpreter
from hecompile.graph.ir import print_model
from hecompile.he.check_store import CheckStore
from hecompile.he.hints import HintStore
from hecompile.he.parameters import RingParameters
from hecompile.passes.offload.lower_worker import LowerWorker
from hecompile.plan.encrypted_linear import encrypted_linear_model
from hecompile.runtime.client.products import CleartextProducts, EncryptedProducts
from hecompile.runtime.transports import InProcessTransport
from hecompile.runtime.worker.worker import Worker

HINT = "hints/model.layers.0.self_attn.o_proj.forward.npy"


@pytest.fixture
def client(build: Path, tmp_path: Path) -> Path:
    """A copy of the client bundle, to be damaged."""
    return Path(shutil.copytree(build / "client", tmp_path / "client"))


def refused(directory: Path, error: type[Exception] = InputError) -> str:
    with pytest.raises(error) as caught:
        ClientBundle.open(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_manifest(directory: Path, change: Callable[[dict[str, Any]], object], rehash: bool = False) -> None:
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    if rehash:
        manifest["plan_id"] = PlanRecord.model_validate(manifest["plan"]).plan_id()
    path.write_text(json.dumps(manifest))


def test_a_good_bundle_opens(build: Path) -> None:
    bundle = ClientBundle.open(build / "client")
    assert (bundle.ring.ring_dim, bundle.ring.rank) == (128, 12)
    assert len(bundle.circuits) == 15 and bundle.plan.lora.target_modules == ["q_proj", "v_proj", "down_proj"]
    text = print_model(bundle.graph())
    assert hashlib.sha256(text.encode()).hexdigest() == bundle.plan.graph_sha256


def test_another_graph_is_refused_even_if_its_file_is_listed(client: Path) -> None:
    """The plan id covers the graph by its own hash: a plan.onnx that is swapped with its file's hash is noticed."""
    path = client / "plan.onnx"
    model = ir.load(path)
    node = next(node for node in model.graph if node.op_type == "RMSNorm")
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.5)
    path.write_bytes(ir.to_proto(model).SerializeToString())

    def relist(manifest: dict[str, Any]) -> None:
        (record,) = [file for file in manifest["files"] if file["path"] == "plan.onnx"]
        record.update(bytes=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest())

    edit_manifest(client, relist)
    assert "plan.onnx is not the graph that the plan was made with" in refused(client)


def test_large_constants_are_not_copied(tmp_path: Path) -> None:
    """The embedding of a large vocabulary stays in its file: the interpreter's tensor lies in the mapping."""
    table = ir.Value(name="table", shape=ir.Shape((4096, 8)), type=ir.TensorType(ir.DataType.FLOAT))
    table.const_value = ir.Tensor(np.arange(4096 * 8, dtype=np.float32).reshape(4096, 8), name="table")
    ids = ir.Value(name="ids", shape=ir.Shape(("n",)), type=ir.TensorType(ir.DataType.INT64))
    gather = ir.node("Gather", [table, ids])
    gather.outputs[0].name = "rows"
    graph = ir.Graph([ids], gather.outputs, nodes=[gather], initializers=[table], opset_imports={"": 23}, name="g")
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    model = ir.load(tmp_path / "m.onnx")
    interpreter = Interpreter(model)
    mapped = model.graph.initializers["table"].const_value
    assert mapped is not None and interpreter.constants["table"].data_ptr() == mapped.numpy().ctypes.data
    rows = interpreter.run({"ids": torch.tensor([1, 4095])})["rows"]
    assert rows[:, 0].tolist() == [8.0, 4095 * 8.0]


def test_truncated_hint(client: Path) -> None:
    path = client / HINT
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{HINT} has {path.stat().st_size} bytes of {path.stat().st_size + 1}" in refused(client)


@pytest.mark.parametrize("name", [HINT, "plan.onnx", "tokenizer/tokenizer.json"])
def test_flipped_bit(client: Path, name: str) -> None:
    path = client / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert f"{name} is corrupt (its hash is wrong)" in refused(client)


@pytest.mark.parametrize("name", [HINT, "plan.onnx", "tokenizer/tokenizer.json"])
def test_missing_file(client: Path, name: str) -> None:
    (client / name).unlink()
    assert f"{name} is missing; make the bundle again with `hecompile export llama`" in refused(client)


@pytest.mark.parametrize("name", [HINT, "plan.onnx"])
def test_file_that_the_manifest_does_not_list(client: Path, name: str) -> None:
    edit_manifest(client, lambda m: m.update(files=[file for file in m["files"] if file["path"] != name]))
    assert f"{name} is not listed" in refused(client)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"format": "other"}'])
def test_manifest_that_is_none(client: Path, content: bytes) -> None:
    (client / "manifest.json").write_bytes(content)
    message = refused(client)
    assert "manifest.json" in message and "make the bundle again" in message


def test_missing_manifest_and_missing_directory(client: Path, tmp_path: Path) -> None:
    (client / "manifest.json").unlink()
    assert "is not a client bundle: manifest.json is missing" in refused(client)
    assert "nowhere does not exist; `hecompile export llama` makes" in refused(tmp_path / "nowhere")


def test_a_plan_of_before_there_were_packed_rings_hashes_to_its_id(client: Path) -> None:
    """Version 3 has no field `packed`, and ids are of the JSON as it stands: computed here without the record."""

    def as_version_3(manifest: dict[str, Any]) -> None:
        assert manifest["plan"]["ring"].pop("packed") is True
        canonical = json.dumps(manifest["plan"], sort_keys=True)
        manifest.update(version=3, plan_id=hashlib.sha256(canonical.encode()).hexdigest())

    edit_manifest(client, as_version_3)
    assert ClientBundle.open(client).ring == RingParameters(128, 12, packed=False)


def test_a_plan_of_version_4_has_one_number_of_weight_bits_and_keeps_its_id(client: Path) -> None:
    def as_version_4(manifest: dict[str, Any]) -> None:
        for circuit in manifest["plan"]["circuits"].values():
            assert circuit.pop("weight_bits") == 10
        canonical = json.dumps(manifest["plan"], sort_keys=True)
        manifest.update(version=4, plan_id=hashlib.sha256(canonical.encode()).hexdigest())

    edit_manifest(client, as_version_4)
    plan = ClientBundle.open(client).plan
    assert {plan.bits_of(name) for name in plan.circuits} == {10}


def test_another_version(client: Path) -> None:
    edit_manifest(client, lambda m: m.update(version=1))
    assert "has format version 1, this program reads (3, 4, 5, 6)" in refused(client)


def test_unknown_and_missing_fields(client: Path) -> None:
    edit_manifest(client, lambda m: m["plan"].update(surprise=1))
    assert "is damaged" in refused(client)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["plan"].update(public_seed="00" * 32),
        lambda m: m["plan"]["circuits"]["model.layers.0.self_attn.o_proj.forward"].update(max_l1=1),
        lambda m: m["plan"].update(graph_sha256="0" * 64),
        lambda m: m.update(plan_id="0" * 64),
    ],
    ids=["seed", "circuit", "graph", "id"],
)
def test_edited_plan(client: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit_manifest(client, change)
    assert "the plan does not hash to its id" in refused(client)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ring_dim": 128, "rank": 8}, "no security estimate covers lattice dimension 1024"),
        ({"ring_dim": 16, "rank": 1, "packed": False}, "no security estimate covers lattice dimension 16"),
        ({"sigma": 1.0}, "sigma must be"),
    ],
)
def test_ring_under_128_bits_is_refused_even_with_a_plan_id_that_fits(
    client: Path, change: dict[str, object], message: str
) -> None:
    edit_manifest(client, lambda m: m["plan"]["ring"].update(change), rehash=True)
    assert message in refused(client, SecurityError)


def test_an_old_ring_without_margin_is_opened_with_a_warning(client: Path, caplog: pytest.LogCaptureFixture) -> None:
    ClientBundle.open(client)
    assert "export again" not in caplog.text
    edit_manifest(client, lambda m: m["plan"]["ring"].update({"ring_dim": 256, "rank": 5, "packed": False}), rehash=True)
    assert ClientBundle.open(client).ring == RingParameters(256, 5)
    assert (
        "134 bits (MATZOV, classical) for one secret, which sinks below 128 after 2^6 blocks of tokens: export again"
        in caplog.text
    )


def test_a_ring_that_the_kernels_are_not_for_is_refused(client: Path) -> None:
    change = {"ring_dim": 8, "rank": 192, "packed": False}  # lattice dimension 1536
    edit_manifest(client, lambda m: m["plan"]["ring"].update(change), rehash=True)
    assert "ring_dim must be a power of two of at least 16, got 8" in refused(client)


@pytest.mark.parametrize(
    "change", [{"upload_bits": 33}, {"reply_bits": 25, "upload_bits": 24}, {"upload_bits": None}, {"max_l2": -1.0}]
)
def test_circuit_that_cannot_be_is_refused(client: Path, change: dict[str, object]) -> None:
    circuit = "model.layers.0.self_attn.o_proj.forward"
    edit_manifest(client, lambda m: m["plan"]["circuits"][circuit].update(change), rehash=True)
    refused(client)


def test_file_outside_the_bundle(client: Path) -> None:
    edit_manifest(client, lambda m: m["files"][0].update(path="../../secrets"))
    assert "names a file outside the bundle" in refused(client)


def other_worker(build: Path, directory: Path, plan_id: str, circuits: int) -> WorkerBundle:
    """A worker bundle with the first so many circuits of the plan, under `plan_id`."""
    own = WorkerBundle.open(build / "worker")
    with WorkerBundleWriter(directory, plan_id) as writer:
        for name in list(ClientBundle.open(build / "client").circuits)[:circuits]:
            spec = own.circuits[name]
            model = encrypted_linear_model(own.weight(name), spec.upload_bits, spec.reply_bits, name)
            writer.add(LowerWorker()(model).model)
        return writer.commit()


def test_worker_of_another_plan_is_refused(build: Path, tmp_path: Path) -> None:
    client = ClientBundle.open(build / "client")
    worker = other_worker(build, tmp_path / "worker", "0" * 64, 16)
    with pytest.raises(WorkerError, match="plan"):
        EncryptedProducts(client, InProcessTransport(Worker(worker).exchange))
    with pytest.raises(InputError, match="export them together"):
        CleartextProducts(client, worker)


def test_worker_without_all_circuits_is_refused(build: Path, tmp_path: Path) -> None:
    client = ClientBundle.open(build / "client")
    worker = other_worker(build, tmp_path / "worker", client.plan_id, 3)
    with pytest.raises(WorkerError, match="the worker lacks 12 circuits of this plan, first: model"):
        EncryptedProducts(client, InProcessTransport(Worker(worker).exchange))


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_an_open_plan_holds_no_descriptors(build: Path) -> None:
    """A mapping needs none; with one for each constant and hint, 80 layers pass the usual limit of 1024."""
    before = descriptors()
    bundle = ClientBundle.open(build / "client")
    graph = bundle.graph()
    worker = Worker(WorkerBundle.open(build / "worker"))
    store = HintStore(bundle.hints, bundle.ring, cache_bytes=0)
    hints = [store.hint(name, linear.out_features, np.float32) for name, linear in bundle.circuits.items()]
    weights = [worker.bundle.weight_digits(name) for name in worker.bundle.circuits]
    assert len(hints) == 15 and weights and graph is not None
    assert descriptors() == before


def test_the_lack_of_descriptors_is_named_and_not_blamed_on_the_files(
    build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = ClientBundle.open(build / "client")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    store, name = HintStore(bundle.hints, bundle.ring, cache_bytes=0), "model.layers.0.self_attn.o_proj.forward"
    worker = WorkerBundle.open(build / "worker")
    monkeypatch.setattr(Path, "open", full)
    for attempt in (
        lambda: store.hint(name, 32),
        lambda: CheckStore(bundle.checks).checks(name, bundle.circuits[name]),
        lambda: worker.weight_digits("known_answer"),
        lambda: ClientBundle.open(build / "client"),
        lambda: WorkerBundle.open(build / "worker"),
    ):
        with pytest.raises(InputError, match=r"too many files open; raise the limit \(`ulimit -n 4096`\)") as caught:
            attempt()
        assert "again with" not in str(caught.value) and "setup" not in str(caught.value)


@pytest.mark.parametrize("change", ["location", "offset", "length"])
def test_a_constant_beyond_the_plans_data_is_refused(client: Path, change: str) -> None:
    model = onnx.load(client / "plan.onnx", load_external_data=False)
    outside = [tensor for tensor in model.graph.initializer if tensor.external_data]
    assert outside
    if change == "length":
        outside[0].dims[0] = 1 << 40
    else:
        (entry,) = (entry for entry in outside[0].external_data if entry.key == change)
        entry.value = "manifest.json" if change == "location" else str(1 << 40)
    (client / "plan.onnx").write_bytes(model.SerializeToString())

    def fits(manifest: dict[str, Any]) -> None:
        (record,) = (record for record in manifest["files"] if record["path"] == "plan.onnx")
        content = (client / "plan.onnx").read_bytes()
        record.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    edit_manifest(client, fits)
    assert "plan.onnx cannot be read" in refused(client) or "is not the graph" in refused(client)
