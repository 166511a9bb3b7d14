"""Carry frames of `hecompile.runtime.wire.framing` as Arrow Flight messages, for the Flight server and client.

A request is one DoExchange call with the descriptor `COMMAND`. Each side sends one message: the frame's header as the
message's app_metadata, and its payload, if it has one, as the body of a record batch with one uint8 column of that many
rows, after the message with its schema.

The calls are gRPC's own, and a message is taken apart here. Arrow's reader would unpack a compressed batch, of which forty
kilobytes may become a gigabyte, before anybody saw its size; here compression is refused by the header. Memory for a message
is bounded by gRPC's limit for received messages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from hecompile.errors import WorkerError
from hecompile.runtime.wire.arrow_headers import batch_header, check_schema, padding, rows_of, schema_header
from hecompile.runtime.wire.framing import MAX_HEADER_BYTES, Frame, check_sizes
from hecompile.runtime.wire.protobuf_fields import Value, field, fields, prefix, varint

COMMAND = b"hecompile.frame.1"
SERVICE, METHOD = "arrow.flight.protocol.FlightService", "DoExchange"
OPTIONS = (
    ("grpc.compression_enabled_algorithms_bitset", 1),  # none: a message may become a thousand times its bytes
    # The defaults of 16 KiB, 64 KiB and 64 KiB mean many small reads and writes for messages of several MiB.
    ("grpc.http2.max_frame_size", 4 << 20),
    ("grpc.http2.lookahead_bytes", 16 << 20),
    ("grpc.http2.write_buffer_size", 16 << 20),
)
"""Options of gRPC for a channel and for a server."""

_DESCRIPTOR, _HEADER, _METADATA, _BODY = 1, 2, 3, 1000
"""Fields of FlightData (format/Flight.proto)."""
_KIND, _NAME = 1, 2
"""Fields of FlightDescriptor: its type, and the command."""
_KIND_COMMAND = 2
_MOST_FIELDS = 16
_MOST_MESSAGES = 4
"""A descriptor, a schema and a batch are three."""


def limits(max_message_bytes: int) -> tuple[tuple[str, int], ...]:
    """Return options of gRPC that bound what is received: frames of `max_message_bytes`, and a message's own headers.

    A message that is larger than a frame may be, and not by more than a frame's header, is refused with its size in words.
    """
    return (
        ("grpc.max_receive_message_length", max_message_bytes + MAX_HEADER_BYTES),
        ("grpc.max_send_message_length", -1),  # what is sent was checked before
    )


def request_messages(frame: Frame) -> Iterator[bytes]:
    """Return the messages of a call that sends `frame`, of which the first has the descriptor alone.

    Arrow's server looks for nothing else in it.
    """
    yield field(_DESCRIPTOR, varint(_KIND << 3) + varint(_KIND_COMMAND) + field(_NAME, COMMAND))
    yield from reply_messages(frame)


def reply_messages(frame: Frame) -> tuple[bytes, ...]:
    """Return the messages that carry `frame`. Its payload is copied once."""
    metadata = field(_METADATA, frame.header)
    size = frame.payload_size
    if not size:
        return (metadata,)
    end = padding(size)
    head = field(_HEADER, batch_header(size)) + metadata + prefix(_BODY, size + len(end))
    return field(_HEADER, schema_header()), b"".join((head, frame.payload, frame.rest, end))


@dataclass(frozen=True)
class _Message:
    """Hold the parts of a FlightData message, empty where it lacks them."""

    descriptor: memoryview
    header: memoryview
    metadata: memoryview
    body: memoryview

    @classmethod
    def parse(cls, content: bytes) -> _Message:
        """Find the parts. Raises WorkerError where the bytes are no message."""
        parts = _parts(memoryview(content))
        return cls(*(parts.get(number, memoryview(b"")) for number in (_DESCRIPTOR, _HEADER, _METADATA, _BODY)))


class FrameReader:
    """Find the frames in the messages of one call, as they come.

    Args:
        messages: of the other side; whatever it raises is passed on.
        max_bytes: largest frame that is taken.
        max_header: longest header of a frame.
    """

    def __init__(self, messages: Iterable[bytes], max_bytes: int, max_header: int = MAX_HEADER_BYTES) -> None:
        self._messages = iter(messages)
        self._max_bytes, self._max_header = max_bytes, max_header
        self._schema_seen = False

    def first_of_call(self) -> Frame | None:
        """Return the frame of a request, as `next_frame` does. Raises WorkerError where its command is another too."""
        content = next(self._messages, None)
        if content is None:
            return None
        message = _Message.parse(content)
        if _parts(message.descriptor).get(_NAME) != COMMAND:
            raise WorkerError(f"unknown command; this worker answers {COMMAND.decode()}")
        return self._frame(message) or self.next_frame()

    def next_frame(self) -> Frame | None:
        """Return the next frame, which shares the message's memory, or None when the other side has ended the call.

        Raises WorkerError where a message is no frame, or is larger than it may be.
        """
        for _ in range(_MOST_MESSAGES):
            content = next(self._messages, None)
            if content is None:
                return None
            if (frame := self._frame(_Message.parse(content))) is not None:
                return frame
        raise WorkerError(f"malformed message: {_MOST_MESSAGES} messages came without a frame")

    def _frame(self, message: _Message) -> Frame | None:
        """Return the frame of a message; None for one that only introduces what comes."""
        payload = memoryview(b"")
        if message.header and not self._schema_seen:
            check_schema(message.header)
            self._schema_seen = True
            if message.metadata:
                raise WorkerError("malformed message: the schema came with a header")
            return None
        if message.header:
            payload = rows_of(message.header, message.body)
            if not message.metadata:
                raise WorkerError("malformed message: it has no header")
        if not message.metadata:
            return None
        check_sizes(len(message.metadata), len(payload), self._max_bytes, self._max_header)
        return Frame(bytes(message.metadata), payload)


def _parts(content: memoryview) -> dict[int, memoryview]:
    """Return the fields of a message that hold bytes, by number. Raises WorkerError where it is no message."""
    try:
        found: list[tuple[int, Value]] = list(fields(content, _MOST_FIELDS))
    except ValueError:
        raise WorkerError("malformed message: it is no message of Arrow Flight") from None
    return {number: value for number, value in found if isinstance(value, memoryview)}
