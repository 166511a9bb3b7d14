"""Frame messages on a stream of bytes: a prefix of fixed size, a JSON header, a payload.

A frame is `magic (4) | header length (uint32) | payload length (uint64) | header | payload`, integers little-endian. Both
lengths are checked before memory is taken for what they announce. `receive_exactly` also reads other protocols' frames.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from hecompile.errors import WorkerError, WorkerUnavailableError
from hecompile.foreign import parse_json

# Python ignores SIGPIPE, but a library loaded later may not: LLVM, inside concrete-python, takes the process down with it.
_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)
MAGIC = b"HEC1"
PREFIX = struct.Struct("<4sIQ")
MAX_HEADER_BYTES = 4 << 20
"""A worker's first reply lists the circuits in about 150 bytes each."""

MAX_REQUEST_HEADER_BYTES = 128 << 10
"""A request names one circuit. JSON takes up to thirty times its bytes in memory, so that less is read of strangers."""

SLOWEST_BYTES_PER_SECOND = 16 << 10
"""A message that comes more slowly, after the time without a byte that it may have once, is given up."""

MAX_MESSAGE_BYTES = 1 << 30

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Frame:
    """Hold header and payload of one message, not joined: payloads are large and are not copied.

    A payload may come in two parts, `payload` and then `rest`. A frame that was received has one.
    """

    header: bytes
    payload: Buffer = b""
    rest: Buffer = b""

    @property
    def size(self) -> int:
        """Count the bytes of the whole frame on a wire."""
        return PREFIX.size + len(self.header) + self.payload_size

    @property
    def payload_size(self) -> int:
        """Count the bytes of the payload, both parts."""
        return len(self.payload) + len(self.rest)

    def joined(self) -> Buffer:
        """Return the payload in one part; it is copied only where it has two."""
        return self.payload if not len(self.rest) else b"".join((self.payload, self.rest))

    def prefix(self) -> bytes:
        """Return the fixed part before the header."""
        return PREFIX.pack(MAGIC, len(self.header), self.payload_size)


def check_sizes(header_bytes: int, payload_bytes: int, max_bytes: int, max_header: int = MAX_HEADER_BYTES) -> None:
    """Raise WorkerError for a frame whose header is too long, or that is larger than `max_bytes` as a whole."""
    if header_bytes > max_header:
        raise WorkerError(f"message header of {header_bytes} bytes; at most {max_header} are accepted")
    if (size := PREFIX.size + header_bytes + payload_bytes) > max_bytes:
        raise WorkerError(f"message of {size} bytes; at most {max_bytes} are accepted; send fewer tokens at a time")


def read_header(frame: Frame) -> dict[str, Any]:
    """Return the JSON object in the header of `frame`. Raises WorkerError where it is something else."""
    try:
        header = parse_json(bytes(frame.header))
    except ValueError as error:
        raise WorkerError("malformed message: the header is not JSON") from error
    if not isinstance(header, dict):
        raise WorkerError("malformed message: the header is not a JSON object")
    return header


def send_frame(connection: socket.socket, frame: Frame, patience: float | None = None) -> None:
    """Send one frame whole, by the socket's own time-out or with `patience` (see `send_exactly`).

    Raises OSError as the socket does.
    """
    for part in (frame.prefix() + frame.header, frame.payload, frame.rest):
        if patience is not None:
            send_exactly(connection, part, patience)
        elif len(part):
            connection.sendall(part, _NO_SIGNAL)


def send_exactly(connection: socket.socket, content: Buffer, patience: float) -> None:
    """Send all of `content` to a peer that may take it slowly, but not for ever.

    The socket's own time-out does not matter, so that another thread may wait for bytes of the same connection.

    Args:
        connection: a stream socket.
        content: what is sent.
        patience: seconds in which nothing is taken, and seconds more than at `SLOWEST_BYTES_PER_SECOND`, after which it is
            given up.

    Raises:
        TimeoutError: it is not taken, or too slowly.
        OSError: as the socket does.
    """
    start, view, sent = time.monotonic(), memoryview(content), 0
    writable = select.poll()
    writable.register(connection, select.POLLOUT)
    while sent < len(view):
        left = patience + sent / SLOWEST_BYTES_PER_SECOND - (time.monotonic() - start)
        if left <= 0 or not writable.poll(1000 * min(patience, left)):
            raise TimeoutError
        with contextlib.suppress(BlockingIOError):
            sent += connection.send(view[sent:], _NO_SIGNAL | socket.MSG_DONTWAIT)


def receive_frame(
    connection: socket.socket,
    max_bytes: int = MAX_MESSAGE_BYTES,
    patience: float | None = None,
    max_header: int = MAX_HEADER_BYTES,
) -> Frame | None:
    """Return the next frame, or None when the other side closed between two frames.

    Args:
        connection: a stream socket.
        max_bytes: largest frame that is read, all of it counted.
        patience: seconds without a byte after which a frame that has begun is given up, as is one that comes more slowly
            than `SLOWEST_BYTES_PER_SECOND`; the socket has no time-out after that. By default its own time-out holds, for
            each piece that comes.
        max_header: longest header that is read.

    Raises:
        WorkerError: the bytes are no frame, or the frame is too large. The stream cannot be read on after that.
        WorkerUnavailableError: nor where the frame stands still, or the stream ends within it.
        OSError: as the socket does, and TimeoutError without `patience`.
    """
    first = connection.recv(1)
    if not first:
        return None
    if patience is None:
        return _rest_of_frame(connection, first, max_bytes, max_header, None)
    try:
        return _rest_of_frame(connection, first, max_bytes, max_header, patience)
    except TimeoutError:
        raise WorkerUnavailableError(
            f"nothing of a message that had begun came for {patience:g} s, or too little"
        ) from None
    finally:
        connection.settimeout(None)


def receive_exactly(connection: socket.socket, count: int, patience: float | None = None) -> memoryview:
    """Receive `count` bytes; check `count` against a limit first.

    Args:
        connection: a stream socket.
        count: how many.
        patience: seconds without a byte, and seconds more than at `SLOWEST_BYTES_PER_SECOND`, after which it is given up;
            None for the socket's own time-out.

    Raises:
        EOFError: the other side closed the connection before.
        TimeoutError: the bytes do not come, or too slowly.
        OSError: as the socket does.
    """
    start = time.monotonic()
    # Not zeroed: memory that was promised and never comes is never touched, and so costs nothing.
    view, received = np.empty(count, dtype=np.uint8).data, 0
    while received < count:
        if patience is not None:
            left = patience + received / SLOWEST_BYTES_PER_SECOND - (time.monotonic() - start)
            if left <= 0:
                raise TimeoutError
            connection.settimeout(min(patience, left))
        chunk = connection.recv_into(view[received:])
        if chunk == 0:
            raise EOFError(f"connection closed in mid-message: {received} of {count} bytes had arrived")
        received += chunk
    return view


def _rest_of_frame(
    connection: socket.socket, first: bytes, max_bytes: int, max_header: int, patience: float | None
) -> Frame:
    try:
        prefix = first + receive_exactly(connection, PREFIX.size - 1, patience)
        magic, header_bytes, payload_bytes = PREFIX.unpack(prefix)
        if magic != MAGIC:
            raise WorkerError("the other side does not speak the hecompile worker protocol (wrong magic number)")
        check_sizes(header_bytes, payload_bytes, max_bytes, max_header)
        header = bytes(receive_exactly(connection, header_bytes, patience))
        return Frame(header, receive_exactly(connection, payload_bytes, patience))
    except EOFError as error:
        raise WorkerUnavailableError(str(error)) from None
