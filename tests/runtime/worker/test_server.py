"""The worker behind sockets: answers, refusals, survival, shutdown, and what it never sends or logs."""

from __future__ import annotations

import json
import logging
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hecompile.bundles.circuit_reference import encrypted_linear_reference
from hecompile.bundles.worker import KNOWN_ANSWER, WorkerBundle
from hecompile.errors import InputError, WorkerError
from hecompile.runtime.transports import InProcessTransport, SocketTransport, connect, open_connection
from hecompile.runtime.wire import framing, protocol
from hecompile.runtime.wire.address import TcpAddress, parse_address
from hecompile.runtime.wire.framing import Frame
from hecompile.runtime.wire.protocol import ErrorReply, EvaluateRequest, HelloRequest
from hecompile.runtime.worker.servers.serve import serve
from hecompile.runtime.worker.servers.sockets import WorkerServer
from hecompile.runtime.worker.worker import Worker, handle
from tests.support.bundles import PLAN_ID, extreme_planes, extreme_weight, write_bundle

WEIGHT = extreme_weight(8, 6)
CIRCUIT = "linear.forward"
OTHER_PLAN = "ffffffff"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> WorkerBundle:
    return write_bundle(tmp_path_factory.mktemp("server") / "worker", {"linear": (WEIGHT, 24, 16)})


@pytest.fixture(scope="module")
def worker(bundle: WorkerBundle) -> Worker:
    return Worker(bundle, "onnxruntime")


@pytest.fixture
def server(worker: Worker) -> Iterator[WorkerServer]:
    with WorkerServer(worker, "tcp://127.0.0.1:0", max_message_bytes=1 << 20) as running:
        yield running


def assert_answers(transport: InProcessTransport | SocketTransport) -> None:
    planes = extreme_planes(3, 5, 8)
    np.testing.assert_array_equal(
        transport.evaluate(CIRCUIT, planes).planes, encrypted_linear_reference(planes, WEIGHT, 16)
    )


def raw_connection(server: WorkerServer) -> socket.socket:
    address = parse_address(server.address)
    assert isinstance(address, TcpAddress)
    return socket.create_connection(address.socket_address, timeout=10)


def test_handler_answers_the_same_whatever_came_before(worker: Worker) -> None:
    planes = extreme_planes(3, 4, 8)
    first = handle(EvaluateRequest(CIRCUIT, planes), worker)
    handle(HelloRequest(PLAN_ID), worker)
    handle(EvaluateRequest(CIRCUIT, extreme_planes(3, 2, 8)), worker)
    second = handle(EvaluateRequest(CIRCUIT, planes), worker)
    assert isinstance(first, protocol.EvaluateReply) and isinstance(second, protocol.EvaluateReply)
    np.testing.assert_array_equal(first.planes, second.planes)


def test_bundle_of_another_plan_is_refused(worker: Worker) -> None:
    message = f"worker bundle is of another plan: expected {OTHER_PLAN}, got {PLAN_ID}"
    with pytest.raises(WorkerError, match=message):
        open_connection(InProcessTransport(worker.exchange), OTHER_PLAN)


def test_worker_that_does_not_check_the_plan_is_refused_by_the_client(worker: Worker, tmp_path: Path) -> None:
    class Agreeable(Worker):
        def exchange(self, frame: Frame) -> Frame:
            request_id, _ = protocol.decode_request(frame)
            return protocol.encode(handle(HelloRequest(self.bundle.plan_id), self), request_id)

    with pytest.raises(WorkerError, match=f"answers for plan {PLAN_ID}; needs plan {OTHER_PLAN}"):
        InProcessTransport(Agreeable(worker.bundle, worker.engine).exchange).hello(OTHER_PLAN)


def test_other_protocol_version_is_refused(worker: Worker) -> None:
    with pytest.raises(WorkerError, match="the client speaks protocol 1, this worker 2; install the same version"):
        handle(HelloRequest(PLAN_ID, protocol=1), worker)

    def of_protocol_1(frame: Frame) -> Frame:
        request_id, _ = protocol.decode_request(frame)
        return protocol.encode(protocol.WorkerInfo(PLAN_ID, "vnni", {}, protocol=1), request_id)

    with pytest.raises(WorkerError, match="the worker speaks protocol 1, this client 2; install the same version"):
        InProcessTransport(of_protocol_1).hello(PLAN_ID)


def test_evaluate_before_hello_is_refused(worker: Worker) -> None:
    with pytest.raises(WorkerError, match="open connections with open_connection"):
        InProcessTransport(worker.exchange).evaluate(CIRCUIT, extreme_planes(3, 1, 8))


@pytest.mark.parametrize("garbage", [b"\x00" * 64, bytes(range(256)) * 16, b"GET / HTTP/1.1\r\n\r\n"])
def test_server_survives_garbage_and_serves_the_others(server: WorkerServer, garbage: bytes) -> None:
    neighbour = connect(server.address)
    open_connection(neighbour, PLAN_ID)
    with raw_connection(server) as connection:
        connection.sendall(garbage)
        frame = framing.receive_frame(connection)
        assert frame is not None
        _, reply = protocol.decode_reply(frame)
        assert isinstance(reply, ErrorReply) and "wrong magic number" in reply.message
        assert framing.receive_frame(connection) is None
    assert_answers(neighbour)
    newcomer = connect(server.address)
    open_connection(newcomer, PLAN_ID)
    assert_answers(newcomer)
    neighbour.close()
    newcomer.close()


def test_refused_request_leaves_the_connection_open(server: WorkerServer) -> None:
    with raw_connection(server) as connection:
        for header, payload, message in [
            ({"kind": "decrypt", "id": 1}, b"", "unknown request kind 'decrypt'"),
            ({"kind": "evaluate", "id": 2, "circuit": "absent", "shape": [8, 1, 1]}, b"x", "no circuit 'absent'"),
            ({"kind": "evaluate", "id": 3, "circuit": CIRCUIT, "shape": [24, 1, 1]}, b"xyz", "planes have shape"),
            ({"kind": "evaluate", "id": 4, "circuit": CIRCUIT, "shape": [16, 1, 8]}, b"x" * 16, "its words have 24 bits"),
        ]:
            framing.send_frame(connection, Frame(json.dumps(header).encode(), payload))
            frame = framing.receive_frame(connection)
            assert frame is not None
            _, reply = protocol.decode_reply(frame)
            assert isinstance(reply, ErrorReply) and message in reply.message


def test_client_that_leaves_in_mid_message_harms_nobody(server: WorkerServer) -> None:
    with raw_connection(server) as connection:
        connection.sendall(framing.PREFIX.pack(framing.MAGIC, 10, 1000) + b"{")
    transport = connect(server.address)
    open_connection(transport, PLAN_ID)
    assert_answers(transport)
    transport.close()


def test_message_above_the_limit_is_refused_on_both_sides(server: WorkerServer) -> None:
    planes = np.zeros((3, 50_000, 8), dtype=np.uint8)
    transport = SocketTransport(server.address, max_message_bytes=1 << 20)
    transport.hello(PLAN_ID)
    with pytest.raises(WorkerError, match="at most 1048576 are sent; use a smaller batch"):
        transport.evaluate(CIRCUIT, planes)
    with raw_connection(server) as connection:
        connection.sendall(framing.PREFIX.pack(framing.MAGIC, 2, 1 << 21))
        frame = framing.receive_frame(connection)
        assert frame is not None
        assert "at most 1048576 are accepted" in str(protocol.decode_reply(frame)[1])


def test_several_clients_at_once(server: WorkerServer) -> None:
    failures: list[BaseException] = []

    def client() -> None:
        try:
            transport = connect(server.address)
            open_connection(transport, PLAN_ID)
            for _ in range(5):
                assert_answers(transport)
            transport.close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


class FailingEngine:
    """Fails with the request's values in its message, as a library might."""

    name = "failing"

    def evaluate(self, circuit: str, planes: np.ndarray) -> np.ndarray:
        raise RuntimeError(f"bad values {planes.tolist()}")


def test_neither_errors_nor_logs_hold_the_payload(bundle: WorkerBundle, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    planes = np.full((3, 1, 8), 173, dtype=np.uint8)
    for engine in (FailingEngine(), "onnxruntime"):
        transport = InProcessTransport(Worker(bundle, engine).exchange)
        transport.hello(PLAN_ID)
        if engine == "onnxruntime":
            transport.evaluate(CIRCUIT, planes)
        else:
            with pytest.raises(WorkerError, match=r"the worker failed with RuntimeError$"):
                transport.evaluate(CIRCUIT, planes)
    logged = caplog.text
    assert "failed with RuntimeError" in logged and f"evaluated {CIRCUIT} for 1 tokens" in logged
    assert "173" not in logged


def test_recorder_sees_every_byte_that_is_counted(server: WorkerServer) -> None:
    traffic: dict[str, bytes] = {"sent": b"", "received": b""}

    def record(direction: str, data: bytes) -> None:
        traffic[direction] += data

    transport = connect(server.address, recorder=record)
    open_connection(transport, PLAN_ID)
    planes = extreme_planes(3, 5, 8)
    reply = transport.evaluate(CIRCUIT, planes).planes
    transport.close()
    assert len(traffic["sent"]) == transport.bytes_sent and traffic["sent"].endswith(planes.tobytes())
    assert len(traffic["received"]) == transport.bytes_received and traffic["received"].endswith(reply.tobytes())


def test_absent_worker_is_named_with_the_remedy(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(WorkerError, match=rf"no worker answers at {free}: Connection refused; start one"):
        connect(free)
    with pytest.raises(WorkerError, match="No such file or directory; start one"):
        connect(f"unix://{tmp_path}/absent")


def test_silent_and_vanishing_workers_are_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        silent = connect(address, reply_timeout=0.05)
        with pytest.raises(WorkerError, match=r"was silent for 0\.05 s"):
            silent.hello(PLAN_ID)
        with pytest.raises(WorkerError, match="is closed; connect again"):
            silent.hello(PLAN_ID)
        listener.accept()[0].close()

        vanishing = connect(address)
        accepted, _ = listener.accept()
        accepted.sendall(framing.PREFIX.pack(framing.MAGIC, 100, 0) + b"{")
        accepted.shutdown(socket.SHUT_WR)
        with pytest.raises(WorkerError, match="closed in mid-message: 1 of 100 bytes"):
            vanishing.hello(PLAN_ID)
        accepted.close()


def test_stopped_server_ends_its_connections(worker: Worker) -> None:
    with WorkerServer(worker, "tcp://127.0.0.1:0") as server:
        transport = connect(server.address)
        open_connection(transport, PLAN_ID)
    with pytest.raises(WorkerError, match=r"broke|closed the connection"):
        transport.evaluate(CIRCUIT, extreme_planes(3, 1, 8))


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:0", "tcp://[::]:0", "tcp://192.0.2.1:7000", "tcp://worker.example:1"])
def test_listening_for_other_machines_must_be_asked_for(worker: Worker, address: str) -> None:
    with pytest.raises(InputError, match=r"can be reached from other machines .* allow_plaintext_network"):
        WorkerServer(worker, address)


def test_listening_for_other_machines_when_asked_for(worker: Worker) -> None:
    with WorkerServer(worker, "tcp://0.0.0.0:0", allow_plaintext_network=True) as server:
        port = server.address.rpartition(":")[2]
        transport = connect(f"tcp://127.0.0.1:{port}")
        transport.hello(PLAN_ID)
        transport.close()


def test_address_in_use_is_named(worker: Worker, server: WorkerServer) -> None:
    with pytest.raises(InputError, match=f"cannot listen on {server.address}: Address already in use"):
        WorkerServer(worker, server.address)


def test_serve_reports_its_address_and_stops(worker: Worker) -> None:
    stop, addresses = threading.Event(), []

    def ready(address: str) -> None:
        addresses.append(address)
        transport = connect(address)
        transport.hello(PLAN_ID)
        transport.close()
        stop.set()

    serve(worker, "tcp://127.0.0.1:0", ready=ready, stop=stop)
    assert len(addresses) == 1 and not addresses[0].endswith(":0")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_worker_cleanly(bundle: WorkerBundle, tmp_path: Path, number: signal.Signals) -> None:
    program = (
        "import sys; from hecompile.bundles.worker import WorkerBundle; "
        "from hecompile.runtime.worker.servers.serve import serve; from hecompile.runtime.worker.worker import Worker; "
        "serve(Worker(WorkerBundle.open(sys.argv[1])), sys.argv[2], ready=lambda a: print(a, flush=True))"
    )
    path = tmp_path / "socket"
    arguments = [sys.executable, "-c", program, str(bundle.directory), f"unix://{path}"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        transport = connect(process.stdout.readline().strip())
        assert KNOWN_ANSWER in open_connection(transport, PLAN_ID).circuits
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
        transport.close()
    assert (process.returncode, errors) == (0, "")
    assert not path.exists()
