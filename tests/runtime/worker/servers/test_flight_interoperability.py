"""Arrow Flight as others speak it: pyarrow's client and server against ours, and what either may not make us unpack."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hecompile.bundles.circuit_reference import encrypted_linear_reference
from hecompile.errors import WorkerError
from hecompile.runtime.transports import connect, open_connection
from hecompile.runtime.wire.framing import Frame
from hecompile.runtime.worker.worker import Worker
from tests.support.bundles import PLAN_ID, extreme_planes, extreme_weight, write_bundle

grpc = pytest.importorskip("grpc")
pa = pytest.importorskip("pyarrow", exc_type=ImportError)
fl = pytest.importorskip("pyarrow.flight", exc_type=ImportError)

from hecompile.runtime.wire.arrow_headers import batch_header, check_schema, padding, rows_of, schema_header  # noqa: E402
from hecompile.runtime.wire.flight_frames import (  # noqa: E402
    COMMAND,
    METHOD,
    SERVICE,
    FrameReader,
    reply_messages,
    request_messages,
)
from hecompile.runtime.wire.protobuf_fields import field  # noqa: E402
from hecompile.runtime.worker.servers.flight import FlightWorkerServer  # noqa: E402

WEIGHT = extreme_weight(8, 6)
CIRCUIT = "linear.forward"
PLANES = extreme_planes(3, 5, 8)
UNPACKED = 256 << 20
MOST_GROWTH = 24 << 20


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    return Worker(write_bundle(tmp_path_factory.mktemp("flight") / "worker", {"linear": (WEIGHT, 24, 16)}), "torch")


@pytest.fixture(scope="module")
def server(worker: Worker) -> Iterator[FlightWorkerServer]:
    with FlightWorkerServer(worker, "flight://127.0.0.1:0") as running:
        yield running


class ForeignServer(fl.FlightServerBase):
    """A worker behind pyarrow's own server."""

    def __init__(self, worker: Worker) -> None:
        super().__init__("grpc://127.0.0.1:0")
        self._worker = worker

    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        assert descriptor.command == COMMAND
        chunk = reader.read_chunk()
        payload = b"" if chunk.data is None else chunk.data.column(0).buffers()[1].to_pybytes()[: chunk.data.num_rows]
        answer = self._worker.exchange(Frame(chunk.app_metadata.to_pybytes(), payload))
        if not len(answer.payload):
            writer.write_metadata(answer.header)
            return
        batch = pa.record_batch({"payload": pa.array(np.frombuffer(answer.payload, np.uint8))})
        writer.begin(batch.schema)
        writer.write_with_metadata(batch, answer.header)


def header_and_body(message: Any) -> tuple[memoryview, memoryview]:
    """The flatbuffer and the body of a message that pyarrow wrote."""
    raw = message.to_pybytes()
    size = struct.unpack_from("<i", raw, 4)[0]
    return memoryview(raw)[8 : 8 + size], memoryview(raw)[8 + size :]


def test_our_client_is_answered_by_a_foreign_server(worker: Worker) -> None:
    with ForeignServer(worker) as foreign, closing(connect(f"flight://127.0.0.1:{foreign.port}")) as transport:
        open_connection(transport, PLAN_ID)
        np.testing.assert_array_equal(
            transport.evaluate(CIRCUIT, PLANES).planes, encrypted_linear_reference(PLANES, WEIGHT, 16)
        )


def test_a_foreign_client_is_answered_by_our_server(server: FlightWorkerServer) -> None:
    client = fl.FlightClient(server.address.replace("flight://", "grpc://"))
    writer, reader = client.do_exchange(fl.FlightDescriptor.for_command(COMMAND), fl.FlightCallOptions(timeout=20))
    batch = pa.record_batch({"payload": pa.array(PLANES.reshape(-1))})
    header = {"kind": "evaluate", "id": 7, "circuit": CIRCUIT, "shape": [24, *PLANES.shape[1:]]}
    with writer:
        writer.begin(batch.schema)
        writer.write_with_metadata(batch, json.dumps(header).encode())
        writer.done_writing()
        answer = reader.read_chunk()
        with pytest.raises(StopIteration):
            reader.read_chunk()
    told = json.loads(answer.app_metadata.to_pybytes())
    assert (told["id"], answer.data.schema.field(0)) == (7, pa.field("payload", pa.uint8(), nullable=False))
    planes = answer.data.column(0).to_numpy().reshape(2, *told["shape"][1:])
    np.testing.assert_array_equal(planes, encrypted_linear_reference(PLANES, WEIGHT, 16))


@pytest.fixture(scope="module")
def packed() -> list[bytes]:
    """Messages of a few kilobytes whose batch would be a quarter of a gigabyte."""
    schema, sink = pa.schema([("payload", pa.uint8())]), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(pa.record_batch([pa.array(np.zeros(UNPACKED, np.uint8))], schema=schema))
    parts = pa.ipc.MessageReader.open_stream(sink.getvalue())
    headers, batch = parts.read_next_message().metadata, parts.read_next_message()
    sent = [
        field(1, b"\x08\x02" + field(2, COMMAND)),
        field(2, headers.to_pybytes()),
        field(2, batch.metadata.to_pybytes()) + field(3, b"{}") + field(1000, batch.body.to_pybytes()),
    ]
    assert sum(map(len, sent)) < 1 << 16
    return sent


def peak_growth(call: Callable[[], object]) -> int:
    """By how many bytes the most memory that this process ever had grows in a call."""

    def peak() -> int:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) << 10

    Path("/proc/self/clear_refs").write_text("5")  # forgets earlier peaks
    before = peak()
    call()
    return peak() - before


def test_the_peak_of_memory_is_seen() -> None:
    assert peak_growth(lambda: b"1" * UNPACKED) > MOST_GROWTH


def test_a_compressed_request_is_refused_and_never_unpacked(server: FlightWorkerServer, packed: list[bytes]) -> None:
    def send() -> None:
        with grpc.insecure_channel(server.address.removeprefix("flight://")) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                list(channel.stream_stream(f"/{SERVICE}/{METHOD}")(iter(packed), timeout=20))
            assert caught.value.details() == "the record batch is compressed: send it as it is"

    assert peak_growth(send) < MOST_GROWTH


def test_a_compressed_reply_is_refused_and_never_unpacked(packed: list[bytes]) -> None:
    handler = grpc.stream_stream_rpc_method_handler(lambda requests, context: iter(packed[1:]))
    hostile = grpc.server(ThreadPoolExecutor(1), (grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
    port = hostile.add_insecure_port("127.0.0.1:0")
    hostile.start()

    def ask() -> None:
        with (
            closing(connect(f"flight://127.0.0.1:{port}", reply_timeout=20)) as transport,
            pytest.raises(WorkerError, match="the record batch is compressed: send it as it is"),
        ):
            transport.hello(PLAN_ID)

    assert peak_growth(ask) < MOST_GROWTH
    hostile.stop(None).wait()


@pytest.mark.parametrize("rows", [0, 1, 24, 1000])
def test_headers_are_those_of_the_format(rows: int) -> None:
    """What pyarrow writes is read, and what we write reads pyarrow."""
    values = np.arange(rows, dtype=np.uint8)
    column = pa.field("anything", pa.uint8(), nullable=bool(rows % 2))
    batch = pa.record_batch([pa.array(values)], schema=pa.schema([column]))
    check_schema(header_and_body(batch.schema.serialize())[0])
    assert bytes(rows_of(*header_and_body(batch.serialize()))) == values.tobytes()
    stream = b"".join(
        b"\xff\xff\xff\xff" + struct.pack("<i", len(header)) + header + body
        for header, body in ((schema_header(), b""), (batch_header(rows), values.tobytes() + padding(rows)))
    )
    with pa.ipc.open_stream(stream) as reader:
        read = reader.read_next_batch()
    read.validate(full=True)
    assert read.column(0).to_numpy().tobytes() == values.tobytes()


HEADERS = (schema_header(), batch_header(24), bytes(header_and_body(pa.schema([("t", pa.string())]).serialize())[0]))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.sampled_from(HEADERS),
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=8),
    st.integers(0, 200),
)
def test_a_damaged_header_is_read_or_refused(header: bytes, changes: list[tuple[int, int]], end: int) -> None:
    damaged = bytearray(header[: max(end, 1)])
    for place, value in changes:
        damaged[place % len(damaged)] = value
    body = memoryview(bytes(24))
    for read in (lambda: check_schema(memoryview(damaged)), lambda: rows_of(memoryview(damaged), body)):
        try:
            rows = read()
        except WorkerError as error:
            assert len(str(error)) < 200
        else:
            assert rows is None or len(rows) <= len(body)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=80), st.integers(0, 400), st.booleans())
def test_damaged_messages_are_read_or_refused(noise: bytes, place: int, request: bool) -> None:
    """Whatever comes, one kind of error says so; what is read fits into what came."""
    whole = list((request_messages if request else reply_messages)(Frame(b'{"kind": "evaluate"}', bytes(24))))
    damaged = [content[:place] + noise + content[place + len(noise) :] for content in whole]
    reader = FrameReader(damaged, 1000)
    try:
        frame = reader.first_of_call() if request else reader.next_frame()
    except WorkerError as error:
        assert len(str(error)) < 200
    else:
        assert frame is None or len(frame.payload) <= sum(map(len, damaged))


def test_messages_without_a_frame_and_of_many_fields_are_given_up() -> None:
    with pytest.raises(WorkerError, match="4 messages came without a frame"):
        FrameReader(iter(lambda: b"", None), 1000).next_frame()
    with pytest.raises(WorkerError, match="it is no message of Arrow Flight"):
        FrameReader([b"\x12\x00" * (1 << 20)], 1000).next_frame()
