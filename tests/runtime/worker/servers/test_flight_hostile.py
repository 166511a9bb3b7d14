"""Arrow Flight and hostile input: one clear refusal each, and the server goes on."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import Any

import numpy as np
import pytest

from hecompile.bundles.circuit_reference import encrypted_linear_reference
from hecompile.bundles.worker import WorkerBundle
from hecompile.runtime.transports import Transport, connect, open_connection
from hecompile.runtime.worker.worker import Worker
from tests.support.bundles import PLAN_ID, extreme_planes, extreme_weight, write_bundle

pa = pytest.importorskip("pyarrow", exc_type=ImportError)
fl = pytest.importorskip("pyarrow.flight", exc_type=ImportError)

from hecompile.runtime.wire.flight_frames import COMMAND  # noqa: E402
from hecompile.runtime.worker.servers.flight import FlightWorkerServer  # noqa: E402

WEIGHT = extreme_weight(8, 6)
CIRCUIT = "linear.forward"
LIMIT = 1 << 20
ANY_PORT = "flight://127.0.0.1:0"
BYTES = pa.uint8()
COLUMN = pa.schema([("payload", BYTES)])
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
EVALUATE = json.dumps({"kind": "evaluate", "id": 1, "circuit": CIRCUIT, "shape": [24, 1, 8]}).encode()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> WorkerBundle:
    return write_bundle(tmp_path_factory.mktemp("flight") / "worker", {"linear": (WEIGHT, 24, 16)})


@pytest.fixture(scope="module")
def worker(bundle: WorkerBundle) -> Worker:
    return Worker(bundle, "torch")


@pytest.fixture(scope="module")
def server(worker: Worker) -> Iterator[FlightWorkerServer]:
    with FlightWorkerServer(worker, ANY_PORT, max_message_bytes=LIMIT) as running:
        yield running


def assert_answers(transport: Transport, tokens: int = 5) -> None:
    planes = extreme_planes(3, tokens, 8, seed=tokens)
    np.testing.assert_array_equal(
        transport.evaluate(CIRCUIT, planes).planes, encrypted_linear_reference(planes, WEIGHT, 16)
    )


def assert_serves(address: str) -> None:
    with closing(connect(address)) as transport:
        open_connection(transport, PLAN_ID)
        assert_answers(transport)


def client_of(address: str) -> Any:
    return fl.FlightClient(address.replace("flight://", "grpc://"))


def raw_call(address: str, send: Callable[[Any], None], descriptor: Any = None) -> str:
    """What the server says to a call in which `send` writes what it likes."""
    writer, reader = client_of(address).do_exchange(
        descriptor or fl.FlightDescriptor.for_command(COMMAND), fl.FlightCallOptions(timeout=20)
    )
    try:
        with suppress(OSError, fl.FlightError, pa.ArrowException):  # what it says is read below
            send(writer)
            writer.done_writing()
        with pytest.raises(fl.FlightServerError) as caught:
            reader.read_chunk()
        return str(caught.value)
    finally:
        with suppress(OSError, fl.FlightError, pa.ArrowException):
            writer.close()


def send_batch(columns: dict[str, Any], header: bytes = EVALUATE, **options: Any) -> Callable[[Any], None]:
    def send(writer: Any) -> None:
        batch = pa.record_batch(columns)
        writer.begin(batch.schema, **options)
        writer.write_with_metadata(batch, header)

    return send


def planes(count: int, kind: Any = BYTES) -> Any:
    return pa.array([7] * count, type=kind)


HOSTILE = {
    "no request": (lambda writer: None, "unknown command|ended without a request|did not arrive whole"),
    "garbage header": (lambda writer: writer.write_metadata(bytes(range(256)) * 16), "the header is not JSON"),
    "empty header": (lambda writer: writer.write_metadata(b""), "ended without a request"),
    "no object": (lambda writer: writer.write_metadata(b"[1]"), "not a JSON object"),
    "deep nesting": (lambda writer: writer.write_metadata(b"[" * 100_000), "the header is not JSON"),
    "long header": (lambda writer: writer.write_metadata(b" " * ((4 << 20) + 1)), "at most 131072 are accepted"),
    "unknown kind": (lambda writer: writer.write_metadata(b'{"kind": "decrypt", "id": 1}'), "unknown request kind"),
    "no payload": (lambda writer: writer.write_metadata(EVALUATE), "is 24 bytes, the payload 0"),
    "no rows": (send_batch({"payload": planes(0)}), "is 24 bytes, the payload 0"),
    "too few bytes": (send_batch({"payload": planes(23)}), "is 24 bytes, the payload 23"),
    "wrong dtype": (send_batch({"payload": planes(24, pa.int8())}), "not one uint8 column"),
    "wide dtype": (send_batch({"payload": planes(24, pa.float64())}), "not one uint8 column"),
    "nested": (send_batch({"payload": pa.array([[1]] * 24)}), "not one uint8 column"),
    "text": (send_batch({"payload": pa.array(["x"] * 24).dictionary_encode()}), "not one uint8 column"),
    "nulls": (send_batch({"payload": pa.array([None, *[7] * 23], type=BYTES)}), "has gaps"),
    "two columns": (send_batch({"payload": planes(24), "b": planes(24)}), "not one uint8 column"),
    "no column": (send_batch({}), "not one uint8 column"),
    "no metadata": (
        lambda writer: (writer.begin(COLUMN), writer.write(pa.record_batch({"payload": planes(24)}))),
        "it has no header",
    ),
    "wrong shape": (
        send_batch({"payload": planes(27)}, EVALUATE.replace(b"[24, 1, 8]", b"[24, 1, 9]")),
        r"planes have shape \[3, 1, 9\]; needs \[3, T, 8\]",
    ),
    "too large": (send_batch({"payload": planes(LIMIT)}), f"at most {LIMIT} are accepted; send fewer tokens"),
    "too large once decompressed": (
        send_batch({"payload": planes(LIMIT)}, options=pa.ipc.IpcWriteOptions(compression="zstd")),
        "the record batch is compressed: send it as it is",
    ),
    "an empty batch, compressed": (
        send_batch({"payload": planes(0)}, options=pa.ipc.IpcWriteOptions(compression="lz4")),
        "the record batch is compressed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_request_is_refused_and_the_server_goes_on(server: FlightWorkerServer, name: str) -> None:
    send, message = HOSTILE[name]
    answer = raw_call(server.address, send)
    assert re.search(message, answer), answer
    assert "Traceback" not in answer
    assert_serves(server.address)


@pytest.mark.parametrize(
    "descriptor", [fl.FlightDescriptor.for_command(b"\xff" * 999), fl.FlightDescriptor.for_path("a")]
)
def test_unknown_descriptor_is_refused(server: FlightWorkerServer, descriptor: Any) -> None:
    assert "unknown command; this worker answers hecompile.frame.1" in raw_call(
        server.address, lambda writer: writer.write_metadata(EVALUATE), descriptor
    )
    assert_serves(server.address)


def test_other_calls_are_refused_without_a_traceback(server: FlightWorkerServer) -> None:
    client = client_of(server.address)
    descriptor = fl.FlightDescriptor.for_command(COMMAND)
    calls: list[Callable[[], object]] = [
        lambda: list(client.list_flights()),
        lambda: client.get_flight_info(descriptor),
        lambda: client.get_schema(descriptor),
        lambda: client.do_get(fl.Ticket(b"x")).read_chunk(),
        lambda: list(client.do_action("evaluate")),
        lambda: list(client.list_actions()),
        lambda: client.do_put(descriptor, COLUMN)[0].close(),
    ]
    for call in calls:
        with pytest.raises(
            (pa.ArrowException, OSError), match="a hecompile worker answers DoExchange and no other call"
        ) as caught:
            call()
        assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("garbage", [b"\x00" * 64, b"GET / HTTP/1.1\r\n\r\n", HTTP2 + b"\xff" * 99])
def test_bytes_that_are_no_grpc_harm_nobody(server: FlightWorkerServer, garbage: bytes) -> None:
    host, port = server.address.removeprefix("flight://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(garbage)
        assert_serves(server.address)
