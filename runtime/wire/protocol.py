"""What client and worker say to each other, and its bytes.

A frame is `magic (4) | header length (uint32) | payload length (uint64) | header | payload`, integers little-endian.
The header is a JSON object with `kind`, `id` and the fields of that kind; the payload is the byte planes, or nothing.

    request  hello     protocol, plan_id              reply  hello     protocol, plan_id, engine, circuits
             evaluate  circuit, shape [L, T, in]             evaluate  shape [R, T, out], seconds
             setup     circuit                               evaluate  shape [4, rank · ring_dim, out], seconds
                                                             error     message

Everything is checked before it is used: whatever bytes arrive, decoding returns a message or raises WorkerError.
"""

from __future__ import annotations

import json
import math
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hecompile.errors import WorkerError, WorkerUnavailableError

# Python ignores SIGPIPE, but a library loaded later may not: LLVM, inside concrete-python, takes the process down with it.
_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)
PROTOCOL_VERSION = 1
MAGIC = b"HEC1"
PREFIX = struct.Struct("<4sIQ")
MAX_HEADER_BYTES = 4 << 20
"""A hello reply lists the circuits in about 150 bytes each."""

MAX_MESSAGE_BYTES = 1 << 30
MAX_ERROR_CHARACTERS = 1000
MAX_NAME_CHARACTERS = 256


@dataclass(frozen=True)
class HelloRequest:
    """The client's opening: the plan it expects the worker to serve."""

    plan_id: str
    protocol: int = PROTOCOL_VERSION


@dataclass(frozen=True)
class EvaluateRequest:
    """planes: uint8 [upload_limbs, T, in_features]."""

    circuit: str
    planes: np.ndarray


@dataclass(frozen=True)
class SetupRequest:
    """The product of a circuit's weight and the public rows that the worker's bundle holds; see
    hecompile/bundles/public_rows.py."""

    circuit: str


@dataclass(frozen=True)
class CircuitInfo:
    """Shape of one circuit as the worker announces it."""

    upload_limbs: int
    in_features: int
    reply_bytes: int
    out_features: int


@dataclass(frozen=True)
class WorkerInfo:
    """The worker's answer to hello."""

    plan_id: str
    engine: str
    circuits: Mapping[str, CircuitInfo]
    protocol: int = PROTOCOL_VERSION


@dataclass(frozen=True)
class EvaluateReply:
    """planes: uint8 [reply_bytes, T, out_features]; compute_seconds: of the engine alone, on the worker's clock."""

    planes: np.ndarray
    compute_seconds: float


@dataclass(frozen=True)
class ErrorReply:
    """The worker could not do as asked; the message holds no byte of a payload."""

    message: str


Request = HelloRequest | EvaluateRequest | SetupRequest
Reply = WorkerInfo | EvaluateReply | ErrorReply
Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Frame:
    """Header and payload of one message, not joined: payloads are large and are not copied."""

    header: bytes
    payload: Buffer = b""

    @property
    def size(self) -> int:
        """Bytes of the whole frame on a wire."""
        return PREFIX.size + len(self.header) + len(self.payload)

    def prefix(self) -> bytes:
        """The fixed part before the header."""
        return PREFIX.pack(MAGIC, len(self.header), len(self.payload))


def encode(message: Request | Reply, request_id: int) -> Frame:
    """The frame of `message`. The payload shares memory with its planes."""
    payload: Buffer = b""
    fields: dict[str, Any]
    match message:
        case HelloRequest(plan_id, protocol):
            fields = {"kind": "hello", "protocol": protocol, "plan_id": plan_id}
        case WorkerInfo(plan_id, engine, circuits, protocol):
            shapes = {
                name: [info.upload_limbs, info.in_features, info.reply_bytes, info.out_features]
                for name, info in circuits.items()
            }
            fields = {"kind": "hello", "protocol": protocol, "plan_id": plan_id, "engine": engine, "circuits": shapes}
        case EvaluateRequest(circuit, planes):
            fields = {"kind": "evaluate", "circuit": circuit, "shape": list(planes.shape)}
            payload = _bytes_of(planes)
        case SetupRequest(circuit):
            fields = {"kind": "setup", "circuit": circuit}
        case EvaluateReply(planes, seconds):
            fields = {"kind": "evaluate", "shape": list(planes.shape), "seconds": seconds}
            payload = _bytes_of(planes)
        case ErrorReply(text):
            fields = {"kind": "error", "message": text[:MAX_ERROR_CHARACTERS]}
    return Frame(json.dumps(fields | {"id": request_id}).encode(), payload)


def decode_request(frame: Frame) -> tuple[int, Request]:
    """(request id, request). Raises WorkerError on anything but a well-formed request."""
    header = _header(frame)
    request_id, kind = _field(header, "id", int), _field(header, "kind", str)
    if kind == "hello":
        return request_id, HelloRequest(_name(header, "plan_id"), _field(header, "protocol", int))
    if kind == "evaluate":
        return request_id, EvaluateRequest(_name(header, "circuit"), _planes(header, frame.payload))
    if kind == "setup":
        return request_id, SetupRequest(_name(header, "circuit"))
    raise WorkerError(f"unknown request kind {kind[:40]!r}; a worker answers hello, evaluate and setup")


def decode_reply(frame: Frame) -> tuple[int, Reply]:
    """(request id, reply). Raises WorkerError on anything but a well-formed reply; an ErrorReply is returned."""
    header = _header(frame)
    request_id, kind = _field(header, "id", int), _field(header, "kind", str)
    if kind == "error":
        # The text comes from a machine that is not trusted and ends up on a terminal.
        text = "".join(c if c.isprintable() else "?" for c in _field(header, "message", str)[:MAX_ERROR_CHARACTERS])
        return request_id, ErrorReply(text)
    if kind == "evaluate":
        seconds = _field(header, "seconds", float)
        if not (math.isfinite(seconds) and seconds >= 0):
            raise WorkerError(f"malformed message: seconds is {seconds}")
        return request_id, EvaluateReply(_planes(header, frame.payload), seconds)
    if kind == "hello":
        raw = _field(header, "circuits", dict)
        circuits = {name: CircuitInfo(*_integers(sizes, 4, "circuits")) for name, sizes in raw.items()}
        plan_id, engine = _name(header, "plan_id"), _name(header, "engine")
        return request_id, WorkerInfo(plan_id, engine, circuits, _field(header, "protocol", int))
    raise WorkerError(f"unknown reply kind {kind[:40]!r}; is there a hecompile worker at this address?")


def send_frame(connection: socket.socket, frame: Frame) -> None:
    """Send one frame whole. Raises OSError as the socket does."""
    connection.sendall(frame.prefix() + frame.header, _NO_SIGNAL)
    if len(frame.payload):
        connection.sendall(frame.payload, _NO_SIGNAL)


def receive_frame(
    connection: socket.socket, max_bytes: int = MAX_MESSAGE_BYTES, patience: float | None = None
) -> Frame | None:
    """The next frame, or None when the other side closed between two frames.

    patience: seconds without a byte after which a frame that has begun is given up; the socket has no time-out before and
    after. By default its own time-out holds.

    Raises WorkerError when the bytes are no frame, the frame is larger than `max_bytes`, stands still, or the stream ends
    within it: the stream cannot be read on after that. OSError (and TimeoutError without `patience`) as the socket does.
    """
    first = connection.recv(1)
    if not first:
        return None
    if patience is None:
        return _rest_of_frame(connection, first, max_bytes)
    connection.settimeout(patience)
    try:
        return _rest_of_frame(connection, first, max_bytes)
    except TimeoutError:
        raise WorkerError(f"nothing of a message that had begun came for {patience:g} s") from None
    finally:
        connection.settimeout(None)


def _rest_of_frame(connection: socket.socket, first: bytes, max_bytes: int) -> Frame:
    magic, header_bytes, payload_bytes = PREFIX.unpack(first + _receive(connection, PREFIX.size - 1))
    if magic != MAGIC:
        raise WorkerError("the other side does not speak the hecompile worker protocol (wrong magic number)")
    if header_bytes > MAX_HEADER_BYTES:
        raise WorkerError(f"message header of {header_bytes} bytes; at most {MAX_HEADER_BYTES} are accepted")
    if (size := PREFIX.size + header_bytes + payload_bytes) > max_bytes:
        raise WorkerError(f"message of {size} bytes; at most {max_bytes} are accepted; send fewer tokens at a time")
    header = bytes(_receive(connection, header_bytes))
    return Frame(header, _receive(connection, payload_bytes))


def _receive(connection: socket.socket, count: int) -> memoryview:
    # Not zeroed: memory that was promised and never comes is never touched, and so costs nothing.
    view, received = np.empty(count, dtype=np.uint8).data, 0
    while received < count:
        chunk = connection.recv_into(view[received:])
        if chunk == 0:
            raise WorkerUnavailableError(f"connection closed in mid-message: {received} of {count} bytes had arrived")
        received += chunk
    return view


def _bytes_of(planes: np.ndarray) -> memoryview:
    if planes.dtype != np.uint8 or planes.ndim != 3:
        raise WorkerError(f"planes are {planes.dtype} of rank {planes.ndim}; needs uint8 [bytes, T, features]")
    return np.ascontiguousarray(planes).reshape(-1).data


def _header(frame: Frame) -> dict[str, Any]:
    try:
        header = json.loads(frame.header)
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, not UTF-8, or an endless number
        raise WorkerError("malformed message: the header is not JSON") from error
    if not isinstance(header, dict):
        raise WorkerError("malformed message: the header is not a JSON object")
    return header


def _field(header: dict[str, Any], name: str, kind: type) -> Any:
    value = header.get(name)
    if kind is float and type(value) is int:
        kind = int
    if type(value) is not kind:  # and not isinstance: JSON's true is no integer
        raise WorkerError(f"malformed message: {name} is {type(value).__name__}; needs {kind.__name__}")
    return value


def _name(header: dict[str, Any], name: str) -> str:
    value: str = _field(header, name, str)
    if not 0 < len(value) <= MAX_NAME_CHARACTERS or not value.isascii() or not value.isprintable():
        raise WorkerError(f"malformed message: {name} is not 1 to {MAX_NAME_CHARACTERS} printable ASCII characters")
    return value


def _integers(value: Any, count: int, name: str) -> list[int]:
    if not isinstance(value, list) or len(value) != count:
        raise WorkerError(f"malformed message: {name} is not a list of {count} integers")
    if not all(type(item) is int and 0 < item < 1 << 32 for item in value):
        raise WorkerError(f"malformed message: {name} holds something else than integers from 1 to 2^32 - 1")
    return value


def _planes(header: dict[str, Any], payload: Buffer) -> np.ndarray:
    shape = _integers(header.get("shape"), 3, "shape")
    if math.prod(shape) != len(payload):
        raise WorkerError(f"malformed message: shape {shape} is {math.prod(shape)} bytes, the payload {len(payload)}")
    return np.frombuffer(payload, dtype=np.uint8).reshape(shape)
