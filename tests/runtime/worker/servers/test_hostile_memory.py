"""What strangers send costs a server no memory that stays, and no place that another client wants."""

from __future__ import annotations

import contextlib
import gc
import gzip
import os
import socket
import threading
import time
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from tritonclient.grpc import service_pb2

from hecompile.bundles.circuit_reference import encrypted_linear_reference
from hecompile.errors import WorkerError, WorkerUnavailableError
from hecompile.runtime.transports import connect, open_connection
from hecompile.runtime.wire import connections, framing
from hecompile.runtime.wire.inference_protocol import MAX_REQUEST_BYTES, fill
from hecompile.runtime.worker.servers.open_server import open_server
from hecompile.runtime.worker.servers.sockets import WorkerServer
from hecompile.runtime.worker.worker import Worker
from tests.support.bundles import PLAN_ID, extreme_planes, extreme_weight, write_bundle

WEIGHT = extreme_weight(8, 6)
PLANES = extreme_planes(3, 4, 8)
SERVICE = "/inference.GRPCInferenceService"


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    return Worker(write_bundle(tmp_path_factory.mktemp("hostile") / "worker", {"linear": (WEIGHT, 24, 16)}))


def resident() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def assert_serves(address: str) -> None:
    own = connect(address, reply_timeout=30)
    open_connection(own, PLAN_ID)
    assert np.array_equal(own.evaluate("linear.forward", PLANES).planes, encrypted_linear_reference(PLANES, WEIGHT, 16))
    own.close()


def test_calls_that_cannot_be_decoded_leave_nothing_behind(worker: Worker) -> None:
    with open_server(worker, "grpc://127.0.0.1:0") as server:
        with grpc.insecure_channel(server.address.removeprefix("grpc://")) as channel:
            call = channel.unary_unary(f"{SERVICE}/ModelInfer")
            codes = set()

            def send(count: int) -> None:
                for _ in range(count):
                    with pytest.raises(grpc.RpcError) as caught:
                        call(b"\xff" * 300)
                    codes.add(caught.value.code())

            send(500)  # what is made once
            before = resident()
            send(2000)
            assert resident() - before < 8 << 20  # 32 MB where gRPC's own decoder refuses
        assert codes == {grpc.StatusCode.INVALID_ARGUMENT}
        assert_serves(server.address)


def test_a_message_of_many_empty_parts_is_refused_before_it_is_decoded() -> None:
    before = resident()
    for content in (b"\x2a\x00" * (8 << 20), b"\x3a\x00" * (1 << 20), b"\x2b" * 100_000, b"\x3a" + b"\xff" * 100_000):
        with pytest.raises(ValueError, match=r"it is (no|larger than any) message of this protocol"):
            fill(service_pb2.ModelInferRequest(), content, MAX_REQUEST_BYTES)
    assert resident() - before < 32 << 20  # 700 MB if it were decoded
    request = service_pb2.ModelInferRequest(model_name="linear.forward", raw_input_contents=[bytes(1 << 20)])
    filled = service_pb2.ModelInferRequest()
    fill(filled, request.SerializeToString(), MAX_REQUEST_BYTES)
    assert filled == request


def test_a_compressed_call_is_refused(worker: Worker) -> None:
    """A few kilobytes of gzip would become hundreds of megabytes before anybody looked at them."""
    with open_server(worker, "grpc://127.0.0.1:0") as server:
        channel = grpc.insecure_channel(server.address.removeprefix("grpc://"), compression=grpc.Compression.Gzip)
        with channel, pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(f"{SERVICE}/ModelInfer")(bytes(64 << 20))
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert len(gzip.compress(bytes(64 << 20))) < 1 << 17
        assert_serves(server.address)


def test_silent_connections_give_their_places_to_those_that_speak(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 8)
    with WorkerServer(worker, "tcp://127.0.0.1:0") as server:
        port = int(server.address.rsplit(":", 1)[1])
        served = connect(server.address)
        open_connection(served, PLAN_ID)
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
        silent[-1].sendall(framing.MAGIC[:2])  # one that has begun counts as silent
        assert_serves(server.address)
        assert np.array_equal(  # who has spoken keeps its place
            served.evaluate("linear.forward", PLANES).planes, encrypted_linear_reference(PLANES, WEIGHT, 16)
        )
        monkeypatch.setattr(connections, "IDLE_SECONDS", 0.0)  # but not for ever
        spoken = []
        for _ in range(10):
            spoken.append(connect(server.address))
            open_connection(spoken[-1], PLAN_ID)
        assert_serves(server.address)
        for connection in silent:
            connection.close()
        for transport in (served, *spoken):
            transport.close()


def test_a_connection_that_begins_no_message_is_ended(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "FIRST_MESSAGE_SECONDS", 0.1)
    with WorkerServer(worker, "tcp://127.0.0.1:0") as server:
        port = int(server.address.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port), timeout=30) as silent:
            assert silent.recv(1) == b""
        own = connect(server.address)
        open_connection(own, PLAN_ID)
        time.sleep(0.3)  # one that has spoken may compute for as long as it likes
        assert own.evaluate("linear.forward", PLANES).planes.shape == (2, 4, 6)
        own.close()


def test_a_message_that_drips_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes in time, and the whole never would."""
    monkeypatch.setattr(framing, "SLOWEST_BYTES_PER_SECOND", 1 << 20)
    near, far = socket.socketpair()
    with near, far:
        ticks = iter(range(1000))
        monkeypatch.setattr(time, "monotonic", lambda: float(next(ticks)))
        far.sendall(framing.PREFIX.pack(framing.MAGIC, 100, 0) + bytes(30))
        with pytest.raises(WorkerError, match="or too little"):
            framing.receive_frame(near, patience=0.2)


def test_a_reply_that_drips_is_given_up_as_from_a_worker_that_is_gone() -> None:
    """Each byte comes well within the longest silence; without a limit on the whole the client would wait for ever."""
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        transport = connect(f"tcp://127.0.0.1:{listener.getsockname()[1]}", reply_timeout=0.5)
        accepted, _ = listener.accept()

        def drip() -> None:
            accepted.sendall(framing.PREFIX.pack(framing.MAGIC, 100_000, 0))
            with contextlib.suppress(OSError):
                while not done.wait(0.01):
                    accepted.sendall(b" ")

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        with pytest.raises(WorkerUnavailableError, match=r"had begun came for 0\.5 s, or too little"):
            transport.hello(PLAN_ID)
        done.set()
        thread.join(5.0)
        accepted.close()


def test_a_header_of_a_request_is_bounded(worker: Worker) -> None:
    with WorkerServer(worker, "tcp://127.0.0.1:0") as server:
        port = int(server.address.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port), timeout=30) as hostile:
            hostile.sendall(framing.PREFIX.pack(framing.MAGIC, framing.MAX_REQUEST_HEADER_BYTES + 1, 0))
            frame = framing.receive_frame(hostile)
        assert frame is not None and b"message header of 131073 bytes" in frame.header
        assert_serves(server.address)


def test_a_configuration_that_is_none_is_no_failure_of_the_server(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "worker", {"linear": (WEIGHT, 24, 16)})
    with open_server(Worker(bundle), "grpc://127.0.0.1:0") as server:
        (bundle.directory / "circuits/linear.forward/config.pbtxt").write_bytes(os.urandom(100))
        with grpc.insecure_channel(server.address.removeprefix("grpc://")) as channel:
            request = service_pb2.ModelConfigRequest(name="linear.forward").SerializeToString()
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(f"{SERVICE}/ModelConfig")(request)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "is damaged" in (caught.value.details() or "")
