"""Send and receive the messages of a polynomial plan, in the frames of `hecompile.runtime.wire.framing`.

    client                                    worker
    open {plan_id, parameters} evaluation keys →
                                              ← ready
    run, ciphertexts of the input →
                                              ← refresh {value, level}, ciphertexts of two primes     as often as the plan
                                              says
    fresh, ciphertexts at the top level →
                                              ← result {level, index, seconds}, ciphertexts of two primes
                                              ← error {message} instead of any of these

Payloads are ciphertexts, uint32 [count, 2, primes, ring_dim], little-endian. The sizes of all messages follow from the
plan, and a message of another size is refused before memory is touched.
"""

from __future__ import annotations

import json
import math
import socket
from typing import Any

import numpy as np

from hecompile.ckks.keys import Words
from hecompile.errors import WorkerError
from hecompile.foreign import printable
from hecompile.runtime.wire.framing import MAX_HEADER_BYTES, PREFIX, Frame, read_header, receive_frame, send_frame

PROTOCOL = 1


PATIENCE = 60.0
"""Seconds that a message may take, from its first byte on, beside what it takes at the slowest rate of `framing`."""


def send(connection: socket.socket, kind: str, words: Words | None = None, **fields: Any) -> int:
    """Send one message with PATIENCE; returns its bytes. Raises OSError as the socket does."""
    shape = [] if words is None else list(words.shape)
    header = json.dumps({"kind": kind, "shape": shape, **fields}).encode()
    payload = b"" if words is None else np.ascontiguousarray(words, dtype="<u4").reshape(-1).view(np.uint8).data
    frame = Frame(header, payload)
    send_frame(connection, frame, PATIENCE)
    return frame.size


def receive(
    connection: socket.socket, most: int, silence: float | None = None, max_header: int = MAX_HEADER_BYTES
) -> tuple[dict[str, Any], Words, int]:
    """Receive the next message.

    Args:
        most: bytes of payload that it may have.
        silence: seconds for it to begin; None for no limit. The rest is received with PATIENCE.
        max_header: longest header that is read.

    Returns its fields, its words uint32 in the shape that it names, and its bytes.
    Raises WorkerError where it is malformed, larger, an error of the other side, or the connection was closed;
    WorkerUnavailableError where it comes too slowly; TimeoutError where it does not begin.
    """
    connection.settimeout(silence)
    frame = receive_frame(connection, most + PREFIX.size + max_header, PATIENCE, max_header)
    if frame is None:
        raise WorkerError("the other side closed the connection; see its log")
    fields = read_header(frame)
    kind, shape = fields.get("kind"), fields.get("shape")
    if kind is None or shape is None:
        raise WorkerError("malformed message: the header lacks the kind or the shape")
    if kind == "error":
        raise WorkerError(f"the other side says: {printable(fields.get('message'))}")
    if not isinstance(shape, list) or len(shape) > 4 or not all(type(size) is int and 0 <= size < 1 << 32 for size in shape):
        raise WorkerError("malformed message: the shape is not a list of at most four sizes")
    expected = 4 * math.prod(shape) if shape else 0
    if expected != len(frame.payload):
        raise WorkerError(f"malformed message: shape {shape} is {expected} bytes, the payload {len(frame.payload)}")
    return fields, np.frombuffer(frame.payload, dtype="<u4").reshape(shape or (0,)), frame.size


def expect(fields: dict[str, Any], *kinds: str) -> str:
    """Return the kind of a message. Raises WorkerError unless it is one of `kinds`."""
    kind = fields["kind"]
    if kind not in kinds:
        raise WorkerError(f"a message {' or '.join(kinds)} was expected, not {str(kind)[:40]!r}")
    return str(kind)
