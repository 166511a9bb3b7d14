"""The client's side of Open Inference Protocol v2: against a worker of this program, and against servers of others."""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from hecompile.bundles.circuit_reference import encrypted_linear_reference
from hecompile.bundles.public_rows import PUBLIC_ROWS, exact_name
from hecompile.bundles.worker import KNOWN_ANSWER, WorkerBundle
from hecompile.compiler.worker_bundle_writer import WorkerBundleWriter
from hecompile.errors import WorkerError
from hecompile.passes.offload.lower_worker import LowerWorker
from hecompile.plan.encrypted_linear import encrypted_linear_model
from hecompile.runtime.transports import connect, connect_for, open_connection
from hecompile.runtime.transports.oip import OipTransport
from hecompile.runtime.worker.servers.open_server import open_server
from hecompile.runtime.worker.worker import Worker
from tests.support.bundles import PLAN_ID, extreme_planes, extreme_weight, write_bundle
from tests.support.foreign_server import ForeignServer

WEIGHT = extreme_weight(300, 256)
CIRCUIT = "layers.0.linear.forward"
OTHER_PLAN = "ffffffff"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> WorkerBundle:
    return write_bundle(tmp_path_factory.mktemp("oip") / "worker", {"layers.0.linear": (WEIGHT, 24, 16)})


@pytest.fixture(scope="module")
def worker(bundle: WorkerBundle) -> Worker:
    return Worker(bundle)


@pytest.fixture
def address(worker: Worker) -> Iterator[str]:
    with open_server(worker, "grpc://127.0.0.1:0") as server:
        yield server.address


@pytest.fixture
def foreign(bundle: WorkerBundle) -> Iterator[ForeignServer]:
    with ForeignServer(bundle.directory / "circuits") as server:
        yield server


def assert_answers(transport: OipTransport, seed: int = 0) -> None:
    planes = extreme_planes(3, 5 + seed, 300, seed=seed)
    np.testing.assert_array_equal(
        transport.evaluate(CIRCUIT, planes).planes, encrypted_linear_reference(planes, WEIGHT, 16)
    )


def test_a_server_of_others_that_has_the_repository_can_be_the_worker(
    foreign: ForeignServer, bundle: WorkerBundle
) -> None:
    transport = OipTransport(foreign.address)
    info = open_connection(transport, PLAN_ID)
    assert (info.plan_id, info.engine) == (PLAN_ID, "onnxruntime_onnx")
    # What the session asks: that each circuit of the plan is there. No list of all is needed for it.
    assert all(name in info.circuits for name in bundle.circuits) and "absent.forward" not in info.circuits
    assert_answers(transport)
    assert transport.evaluate(CIRCUIT, extreme_planes(3, 1, 300)).worker_seconds == 0, "it does not say"
    transport.close()


def test_another_plan_is_found_out_by_the_known_answer_where_nothing_tells_it(foreign: ForeignServer) -> None:
    with pytest.raises(WorkerError, match=r"engine onnxruntime_onnx.* computes wrongly"):
        open_connection(OipTransport(foreign.address), OTHER_PLAN)


def test_another_plan_is_refused_at_once_where_it_is_told(address: str) -> None:
    with pytest.raises(WorkerError, match=f"of another plan: expected {OTHER_PLAN}, got {PLAN_ID}"):
        open_connection(OipTransport(address), OTHER_PLAN)


def test_a_server_without_a_bundle_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with (
        ForeignServer(tmp_path / "empty") as server,
        pytest.raises(
            WorkerError, match=f"does not serve a worker bundle yet: the model {KNOWN_ANSWER}, .* is not ready"
        ),
    ):
        open_connection(OipTransport(server.address), PLAN_ID)


def test_a_circuit_that_the_server_lacks_is_named(bundle: WorkerBundle, tmp_path: Path) -> None:
    shutil.copytree(bundle.directory / "circuits" / KNOWN_ANSWER, tmp_path / "some" / KNOWN_ANSWER)
    with ForeignServer(tmp_path / "some") as server:
        transport = OipTransport(server.address)
        info = open_connection(transport, PLAN_ID)
        assert CIRCUIT not in info.circuits
        with pytest.raises(WorkerError, match=f"the worker has no circuit '{CIRCUIT}'; start it on the bundle"):
            transport.evaluate(CIRCUIT, extreme_planes(3, 1, 300))
        transport.close()


def changed_reply(response: service_pb2.ModelInferResponse, change: str) -> None:
    if change == "shape":
        response.outputs[0].shape[1] += 1
    elif change == "short":
        response.raw_output_contents[0] = response.raw_output_contents[0][:-1]
    elif change == "none":
        del response.raw_output_contents[:]
    elif change == "datatype":
        response.outputs[0].datatype = "INT8"
    elif change == "seconds":
        response.parameters["compute_seconds"].double_param = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("shape", r"the reply has shape \(2, 6, 256\); needs \(2, 5, 256\)"),
        ("short", "the reply is 2559 bytes; needs 2560"),
        ("none", "not the one raw UINT8 tensor 'reply'"),
        ("datatype", "not the one raw UINT8 tensor 'reply'"),
        ("seconds", None),
    ],
)
def test_an_answer_is_checked(
    bundle: WorkerBundle, monkeypatch: pytest.MonkeyPatch, change: str, message: str | None
) -> None:
    infer = ForeignServer.ModelInfer

    def changed(self, request, context):
        response = infer(self, request, context)
        if request.model_name == CIRCUIT:
            changed_reply(response, change)
        return response

    monkeypatch.setattr(ForeignServer, "ModelInfer", changed)
    with ForeignServer(bundle.directory / "circuits") as server:
        transport = OipTransport(server.address)
        open_connection(transport, PLAN_ID)
        if message is None:
            assert transport.evaluate(CIRCUIT, extreme_planes(3, 5, 300)).worker_seconds == 0
        else:
            with pytest.raises(WorkerError, match=message):
                transport.evaluate(CIRCUIT, extreme_planes(3, 5, 300))


def test_the_text_of_a_server_is_made_printable(bundle: WorkerBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self, request, context):
        context.abort(grpc.StatusCode.PERMISSION_DENIED, "no\x1b[2J" + "x" * 3000)

    monkeypatch.setattr(ForeignServer, "ModelInfer", refuse)
    with ForeignServer(bundle.directory / "circuits") as server:
        transport = OipTransport(server.address)
        refused = r"refused the request \(gRPC status PERMISSION_DENIED\): no\?\[2Jx+$"
        with pytest.raises(WorkerError, match=refused) as caught:
            open_connection(transport, PLAN_ID)
    assert len(str(caught.value)) < 1200


def test_parallel_requests_on_one_connection_are_not_mixed_up(address: str) -> None:
    transport = OipTransport(address)
    open_connection(transport, PLAN_ID)
    with ThreadPoolExecutor(8) as threads:
        for future in [threads.submit(assert_answers, transport, seed) for seed in range(24)]:
            future.result()
    transport.close()


def test_eight_requests_are_under_way_at_once(worker: Worker) -> None:
    """A barrier in the engine, which only opens when all of them are there."""
    barrier = threading.Barrier(8)

    class Meeting:
        name = "meeting"

        def evaluate(self, circuit: str, planes: np.ndarray) -> np.ndarray:
            if circuit == CIRCUIT:
                barrier.wait(timeout=30)
            return worker.engine.evaluate(circuit, planes)

    with open_server(Worker(worker.bundle, Meeting()), "grpc://127.0.0.1:0") as server:
        transport = connect_for(server.address, in_flight=8)
        assert isinstance(transport, OipTransport) and transport.concurrent
        open_connection(transport, PLAN_ID)
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda seed: assert_answers(transport, seed), range(8)))
        transport.close()


def test_every_byte_is_counted_and_recorded(address: str) -> None:
    traffic: dict[str, bytes] = {"sent": b"", "received": b""}

    def record(direction: str, data: bytes) -> None:
        traffic[direction] += data

    transport = connect(address, recorder=record)
    open_connection(transport, PLAN_ID)
    planes = extreme_planes(3, 5, 300)
    answer = transport.evaluate(CIRCUIT, planes)
    assert (len(traffic["sent"]), len(traffic["received"])) == (transport.bytes_sent, transport.bytes_received)
    sent, received = traffic["sent"][-answer.bytes_sent :], traffic["received"][-answer.bytes_received :]
    assert service_pb2.ModelInferRequest.FromString(sent).raw_input_contents[0] == planes.tobytes()
    assert service_pb2.ModelInferResponse.FromString(received).raw_output_contents[0] == answer.planes.tobytes()
    transport.close()


def test_a_request_above_the_limit_is_not_sent(address: str) -> None:
    transport = OipTransport(address, max_message_bytes=100_000)
    open_connection(transport, PLAN_ID)
    with pytest.raises(WorkerError, match="at most 100000 are sent; use a smaller batch"):
        transport.evaluate(CIRCUIT, extreme_planes(3, 200, 300))
    assert_answers(transport)
    transport.close()


def test_calls_before_hello_and_after_close_are_refused(address: str) -> None:
    transport = OipTransport(address)
    with pytest.raises(WorkerError, match="open connections with open_connection"):
        assert_answers(transport)
    open_connection(transport, PLAN_ID)
    transport.close()
    with pytest.raises(WorkerError, match="is closed; connect again"):
        assert_answers(transport)


def test_absent_and_silent_workers_are_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        silent = f"grpc://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(WorkerError, match=rf"{silent} was silent for 0\.5 s \(gRPC status DEADLINE_EXCEEDED\)"):
            OipTransport(silent, connect_timeout=0.5).hello(PLAN_ID)
    with pytest.raises(
        WorkerError, match=rf"{silent} cannot be reached \(gRPC status UNAVAILABLE.*hecompile worker serve"
    ):
        OipTransport(silent).hello(PLAN_ID)


def test_a_worker_that_stops_is_named_and_one_that_comes_back_answers(worker: Worker) -> None:
    with open_server(worker, "grpc://127.0.0.1:0") as server:
        transport = OipTransport(server.address)
        open_connection(transport, PLAN_ID)
    with pytest.raises(WorkerError, match=r"cannot be reached \(gRPC status UNAVAILABLE"):
        assert_answers(transport)
    transport.close()
    with open_server(worker, server.address):
        transport = OipTransport(server.address)
        open_connection(transport, PLAN_ID)
        assert_answers(transport)
        transport.close()


def test_hints_come_from_a_worker_of_this_program_alone(tmp_path: Path, worker: Worker, address: str) -> None:
    """The rows here are any bytes: that they are those of a plan's matrix is not the transport's business."""
    rows = extreme_planes(4, 7, 300)
    with WorkerBundleWriter(tmp_path / "worker", PLAN_ID) as writer:
        writer.add(LowerWorker()(encrypted_linear_model(WEIGHT, 24, 16, CIRCUIT)).model)
        writer.add(LowerWorker()(encrypted_linear_model(WEIGHT, 32, 32, exact_name(CIRCUIT))).model)
        directory = writer.commit().directory
    np.save(directory / PUBLIC_ROWS, rows)
    some = Worker(WorkerBundle(directory, PLAN_ID, WorkerBundle.open(directory).circuits, has_public_rows=True))
    with open_server(some, "grpc://127.0.0.1:0") as server:
        transport = OipTransport(server.address)
        open_connection(transport, PLAN_ID)
        answer = transport.setup(CIRCUIT, 7)
        np.testing.assert_array_equal(answer.planes, encrypted_linear_reference(rows, WEIGHT, 32))
        assert answer.bytes_sent < 200 and answer.worker_seconds > 0
        transport.close()
    with ForeignServer(directory / "circuits") as server:
        transport = OipTransport(server.address)
        open_connection(transport, PLAN_ID)
        with pytest.raises(WorkerError, match=rf"computes no hints \(no circuit '{exact_name(CIRCUIT)}'\)"):
            transport.setup(CIRCUIT, 7)
        transport.close()
