"""A worker behind Open Inference Protocol v2 as a third party sees it: NVIDIA's client, raw messages, wrong requests."""

from __future__ import annotations

import logging
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput, service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from hecompile.bundles.circuit_reference import encrypted_linear_reference
from hecompile.bundles.worker import KNOWN_ANSWER, WorkerBundle, known_answer_vector
from hecompile.errors import InputError, WorkerUnavailableError
from hecompile.runtime.transports.oip import OipTransport
from hecompile.runtime.wire.address import TcpAddress
from hecompile.runtime.worker.servers.oip import OipServer
from hecompile.runtime.worker.servers.open_server import open_server
from hecompile.runtime.worker.worker import Worker
from tests.support.bundles import PLAN_ID, extreme_planes, extreme_weight, write_bundle

WEIGHT = extreme_weight(8, 6)
CIRCUIT = "layers.0.linear.forward"
LIMIT = 1 << 20
SECRET_BYTE = 173


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> WorkerBundle:
    return write_bundle(tmp_path_factory.mktemp("oip") / "worker", {"layers.0.linear": (WEIGHT, 24, 16)})


@pytest.fixture(scope="module")
def worker(bundle: WorkerBundle) -> Worker:
    return Worker(bundle)


@pytest.fixture
def url(worker: Worker) -> Iterator[str]:
    with open_server(worker, "grpc://127.0.0.1:0", max_message_bytes=LIMIT) as server:
        yield server.address.removeprefix("grpc://")


def ask(client: InferenceServerClient, planes: np.ndarray, circuit: str = CIRCUIT, **options: object) -> np.ndarray:
    tensor = InferInput("ciphertext", list(planes.shape), "UINT8")
    tensor.set_data_from_numpy(planes)
    return client.infer(circuit, [tensor], outputs=[InferRequestedOutput("reply")], **options).as_numpy("reply")


def assert_answers(client: InferenceServerClient, **options: object) -> None:
    planes = extreme_planes(3, 5, 8)
    np.testing.assert_array_equal(ask(client, planes, **options), encrypted_linear_reference(planes, WEIGHT, 16))


def test_the_client_of_others_finds_and_runs_every_circuit(url: str, bundle: WorkerBundle) -> None:
    with InferenceServerClient(url) as client:
        assert client.is_server_live() and client.is_server_ready()
        assert client.get_server_metadata().name == "hecompile"
        index = client.get_model_repository_index()
        assert {(model.name, model.version, model.state) for model in index.models} == {
            (name, "1", "READY") for name in bundle.circuits
        }
        for name, spec in bundle.circuits.items():
            assert client.is_model_ready(name) and client.is_model_ready(name, "1")
            metadata, config = client.get_model_metadata(name), client.get_model_config(name).config
            assert (metadata.name, list(metadata.versions)) == (name, ["1"])
            for told, configured, shape in (
                (metadata.inputs, config.input, [spec.upload_limbs, -1, spec.in_features]),
                (metadata.outputs, config.output, [spec.reply_bytes, -1, spec.out_features]),
            ):
                assert [(t.name, t.datatype, list(t.shape)) for t in told] == [(configured[0].name, "UINT8", shape)]
                assert list(configured[0].dims) == shape
            assert config.parameters["plan_id"].string_value == PLAN_ID
        assert not client.is_model_ready("absent") and not client.is_model_ready(CIRCUIT, "2")
        assert_answers(client)
        assert_answers(client, model_version="1")
        planes, expected = known_answer_vector(PLAN_ID)
        np.testing.assert_array_equal(ask(client, planes, KNOWN_ANSWER), expected)


def test_an_answer_tells_its_request_and_what_it_took(url: str) -> None:
    with InferenceServerClient(url) as client:
        tensor = InferInput("ciphertext", [3, 1, 8], "UINT8")
        tensor.set_data_from_numpy(extreme_planes(3, 1, 8))
        response = client.infer(CIRCUIT, [tensor], request_id="seven").get_response()
    assert (response.model_name, response.model_version, response.id) == (CIRCUIT, "1", "seven")
    assert 0 < response.parameters["compute_seconds"].double_param < 10


def request(**changes: object) -> service_pb2.ModelInferRequest:
    """A right request, whose every tensor byte is SECRET_BYTE, with some of its parts changed."""
    parts = {"model": CIRCUIT, "version": "", "name": "ciphertext", "datatype": "UINT8", "shape": [3, 2, 8]}
    parts |= {"raw": [bytes([SECRET_BYTE]) * 48], "output": "reply", "parameter": None} | changes
    made = service_pb2.ModelInferRequest(model_name=parts["model"], model_version=parts["version"])
    made.inputs.add(name=parts["name"], datatype=parts["datatype"], shape=parts["shape"])
    made.outputs.add(name=parts["output"])
    made.raw_input_contents.extend(parts["raw"])
    if parts["parameter"]:
        made.parameters[parts["parameter"]].bool_param = True
    return made


BYTE = bytes([SECRET_BYTE])
REFUSED = {
    "unknown model": ({"model": "absent.forward"}, "NOT_FOUND", "no circuit 'absent.forward'; it holds 3 others"),
    "endless name": ({"model": "x" * 5000}, "NOT_FOUND", f"no circuit '{'x' * 80}'"),
    "unknown version": ({"version": "2"}, "NOT_FOUND", f"circuit {CIRCUIT} has version 1"),
    "wrong input": ({"name": "plaintext"}, "INVALID_ARGUMENT", "takes the one input 'ciphertext'"),
    "wrong output": ({"output": "weight"}, "INVALID_ARGUMENT", "has the one output 'reply'"),
    "wrong dtype": ({"datatype": "INT8"}, "INVALID_ARGUMENT", "ciphertext is 'INT8'; needs UINT8"),
    "wrong limbs": ({"shape": [2, 3, 8]}, "INVALID_ARGUMENT", r"shape \[2, 3, 8\]; needs \[3, T, 8\]"),
    "wrong features": ({"shape": [3, 4, 4]}, "INVALID_ARGUMENT", r"shape \[3, 4, 4\]; needs \[3, T, 8\]"),
    "wrong rank": ({"shape": [6, 8]}, "INVALID_ARGUMENT", r"shape \[6, 8\]; needs \[limbs, T, in\]"),
    "negative sizes": ({"shape": [3, -2, -8]}, "INVALID_ARGUMENT", r"shape \[3, -2, -8\]"),
    "no tokens": ({"shape": [3, 0, 8], "raw": [b""]}, "INVALID_ARGUMENT", r"shape \[3, 0, 8\]"),
    "truncated": ({"raw": [BYTE * 47]}, "INVALID_ARGUMENT", r"shape \[3, 2, 8\] is 48 bytes, the raw content 47"),
    "too long": ({"raw": [BYTE * 49]}, "INVALID_ARGUMENT", "48 bytes, the raw content 49"),
    "overflowing sizes": ({"shape": [3, 1 << 62, 8]}, "INVALID_ARGUMENT", "the raw content 48"),
    "no contents": ({"raw": []}, "INVALID_ARGUMENT", "one raw content; got 0"),
    "two contents": ({"raw": [BYTE * 48, BYTE]}, "INVALID_ARGUMENT", "one raw content; got 2"),
    "public rows of none": ({"parameter": "public_rows"}, "FAILED_PRECONDITION", "exported with --no-hints can"),
    "too large": ({"shape": [3, LIMIT, 8], "raw": [BYTE * (24 * LIMIT)]}, "RESOURCE_EXHAUSTED", "larger than max"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_request_is_refused_with_its_reason_and_no_byte_of_it(
    url: str, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    changes, code, message = REFUSED[case]
    with grpc.insecure_channel(url, [("grpc.max_send_message_length", -1)]) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError, match=message) as caught:
            stub.ModelInfer(request(**changes), timeout=60)
        assert caught.value.code().name == code
        assert str(SECRET_BYTE) not in caught.value.details() + caplog.text
        assert "\\xad" not in caught.value.details() + caplog.text
        good = stub.ModelInfer(request(), timeout=60)
    planes = np.full((3, 2, 8), SECRET_BYTE, np.uint8)
    assert good.raw_output_contents[0] == encrypted_linear_reference(planes, WEIGHT, 16).tobytes()


def test_what_is_no_message_is_refused_and_the_server_stays_up(url: str) -> None:
    with grpc.insecure_channel(url) as channel:
        send = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        with pytest.raises(grpc.RpcError) as caught:
            send(b"\xff" * 100, timeout=60)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    host, _, port = url.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(bytes(range(256)) * 16)
        while connection.recv(4096):
            pass
    with InferenceServerClient(url) as client:
        assert_answers(client)


def test_a_method_that_is_not_there_says_so(url: str) -> None:
    with InferenceServerClient(url) as client:
        with pytest.raises(InferenceServerException, match="UNIMPLEMENTED"):
            client.unload_model(CIRCUIT)
        assert client.is_model_ready(CIRCUIT)


class FailingEngine:
    """Fails with the request's values in its message, as a library might."""

    name = "failing"

    def evaluate(self, circuit: str, planes: np.ndarray) -> np.ndarray:
        raise RuntimeError(f"bad values {planes.tolist()}")


def test_a_failure_of_the_engine_is_told_without_the_payload(
    bundle: WorkerBundle, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with (
        open_server(Worker(bundle, FailingEngine()), "grpc://127.0.0.1:0") as server,
        InferenceServerClient(server.address.removeprefix("grpc://")) as client,
        pytest.raises(InferenceServerException, match=r"INTERNAL.* the worker failed with RuntimeError$") as caught,
    ):
        ask(client, np.full((3, 1, 8), SECRET_BYTE, np.uint8))
    assert str(SECRET_BYTE) not in str(caught.value) + caplog.text
    assert "the worker failed with RuntimeError" in caplog.text


def test_eight_requests_at_once_are_not_mixed_up(url: str) -> None:
    def client_of(index: int) -> bool:
        with InferenceServerClient(url) as client:
            for round_ in range(3):
                planes = extreme_planes(3, 4 + index, 8, seed=100 * index + round_)
                expected = encrypted_linear_reference(planes, WEIGHT, 16)
                np.testing.assert_array_equal(ask(client, planes), expected)
        return True

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(client_of, range(8)))


class WaitingEngine:
    """Answers when it is told to."""

    name = "waiting"

    def __init__(self, worker: Worker) -> None:
        self._engine, self.entered, self.go = worker.engine, threading.Semaphore(0), threading.Event()

    def evaluate(self, circuit: str, planes: np.ndarray) -> np.ndarray:
        self.entered.release()
        assert self.go.wait(60)
        return self._engine.evaluate(circuit, planes)


def test_more_requests_than_it_takes_are_refused_and_those_under_way_answered(worker: Worker) -> None:
    engine = WaitingEngine(worker)
    server = OipServer(Worker(worker.bundle, engine), TcpAddress("127.0.0.1", 0, "grpc"), max_requests=2)
    with server, grpc.insecure_channel(server.address.removeprefix("grpc://")) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        waiting = [stub.ModelInfer.future(request(), timeout=60) for _ in range(2)]
        assert all(engine.entered.acquire(timeout=30) for _ in waiting)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(request(), timeout=60)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        with pytest.raises(WorkerUnavailableError, match="is busy"):  # which a client asks again, later or elsewhere
            OipTransport(server.address).hello(PLAN_ID)
        engine.go.set()
        planes = np.full((3, 2, 8), SECRET_BYTE, np.uint8)
        expected = encrypted_linear_reference(planes, WEIGHT, 16).tobytes()
        assert [call.result().raw_output_contents[0] for call in waiting] == [expected] * 2


def test_an_address_that_is_in_use_is_named(worker: Worker, url: str) -> None:
    with pytest.raises(InputError, match=f"cannot listen on grpc://{url}: the address is in use"):
        open_server(worker, f"grpc://{url}")


def test_packages_that_are_missing_are_named(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "hecompile.runtime.worker.servers.oip")
    monkeypatch.setitem(sys.modules, "grpc", None)  # as if it were not installed
    with pytest.raises(InputError, match=r"not installed \(grpc\): pip install .*\[network\]"):
        open_server(worker, "grpc://127.0.0.1:0")
