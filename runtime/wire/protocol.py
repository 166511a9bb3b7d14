"""Encode and decode the messages of client and worker as frames of `hecompile.runtime.wire.framing`.

The header has `kind`, `id` and the fields of that kind; the payload is words of B bits, or nothing (`word_bits`).

    request  hello     protocol, plan_id              reply  hello     protocol, plan_id, engine, circuits
             evaluate  circuit, shape [B, T, in]             evaluate  shape [B, T, out], seconds
             setup     circuit                               evaluate  shape [32, rank · ring_dim, out], seconds
             hint      circuit                               evaluate  shape [8, 1, bytes of the file], seconds
                                                             error     message

Protocol 1 counted the bytes of a word where this one counts its bits. Hello and error are as they were, so either side
tells the other which protocol it speaks.

Everything is checked before it is used: decoding returns a message or raises WorkerError, whatever bytes arrive.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hecompile.errors import WorkerError
from hecompile.foreign import finite, printable
from hecompile.runtime.wire.framing import Buffer, Frame, read_header
from hecompile.runtime.wire.word_bits import pack, unpack, whole_bytes
from hecompile.word_sizes import bytes_of, wire_bytes

PROTOCOL_VERSION = 2
MIN_BITS, MAX_BITS = 8, 32
"""Bits of a word. With fewer than 8 a message could be eight times as large in memory."""

MAX_ERROR_CHARACTERS = 1000
MAX_NAME_CHARACTERS = 256


@dataclass(frozen=True)
class HelloRequest:
    """Open a connection: the client names the plan that it expects the worker to serve."""

    plan_id: str
    protocol: int = PROTOCOL_VERSION


@dataclass(frozen=True)
class EvaluateRequest:
    """Ask for the product of a circuit's weight and ciphertext planes, uint8 [upload_limbs, T, in_features].

    bits: of a word, the highest of its bytes; None for all of them.
    """

    circuit: str
    planes: np.ndarray
    bits: int | None = None


@dataclass(frozen=True)
class SetupRequest:
    """Ask for the product of a circuit's weight and the public rows in the worker's bundle.

    See hecompile/bundles/public_rows.py.
    """

    circuit: str


@dataclass(frozen=True)
class HintRequest:
    """Ask for the file of a circuit's hint that lies in the worker's bundle: see hecompile/bundles/hint_files.py."""

    circuit: str


@dataclass(frozen=True)
class CircuitInfo:
    """Hold the shape of one circuit as the worker announces it."""

    upload_bits: int
    in_features: int
    reply_bits: int
    out_features: int

    @property
    def reply_bytes(self) -> int:
        """Return the bytes that hold a returned word."""
        return bytes_of(self.reply_bits)


@dataclass(frozen=True)
class WorkerInfo:
    """Answer hello: the worker's plan, engine and circuits."""

    plan_id: str
    engine: str
    circuits: Mapping[str, CircuitInfo]
    protocol: int = PROTOCOL_VERSION


@dataclass(frozen=True)
class EvaluateReply:
    """Answer with a product: planes uint8 [reply_bytes, T, out_features], and the engine's seconds on the worker's clock.

    bits: of a word, the highest of its bytes; None for all of them.
    """

    planes: np.ndarray
    compute_seconds: float
    bits: int | None = None


@dataclass(frozen=True)
class ErrorReply:
    """Refuse a request; the message says why and holds no byte of a payload."""

    message: str


Request = HelloRequest | EvaluateRequest | SetupRequest | HintRequest
Reply = WorkerInfo | EvaluateReply | ErrorReply


def encode(message: Request | Reply, request_id: int) -> Frame:
    """Return the frame of `message`. The payload shares memory with its planes, but for bits that are packed."""
    payload: Buffer = b""
    rest: Buffer = b""
    fields: dict[str, Any]
    match message:
        case HelloRequest(plan_id, protocol):
            fields = {"kind": "hello", "protocol": protocol, "plan_id": plan_id}
        case WorkerInfo(plan_id, engine, circuits, protocol):
            shapes = {
                name: [info.upload_bits, info.in_features, info.reply_bits, info.out_features]
                for name, info in circuits.items()
            }
            fields = {"kind": "hello", "protocol": protocol, "plan_id": plan_id, "engine": engine, "circuits": shapes}
        case EvaluateRequest(circuit, planes, bits):
            shape, payload, rest = _packed(planes, bits)
            fields = {"kind": "evaluate", "circuit": circuit, "shape": shape}
        case SetupRequest(circuit):
            fields = {"kind": "setup", "circuit": circuit}
        case HintRequest(circuit):
            fields = {"kind": "hint", "circuit": circuit}
        case EvaluateReply(planes, seconds, bits):
            shape, payload, rest = _packed(planes, bits)
            fields = {"kind": "evaluate", "shape": shape, "seconds": seconds}
        case ErrorReply(text):
            fields = {"kind": "error", "message": text[:MAX_ERROR_CHARACTERS]}
    return Frame(json.dumps(fields | {"id": request_id}).encode(), payload, rest)


def decode_request(frame: Frame) -> tuple[int, Request]:
    """Return (request id, request). Raises WorkerError for anything but a well-formed request."""
    header = read_header(frame)
    request_id, kind = _field(header, "id", int), _field(header, "kind", str)
    if kind == "hello":
        return request_id, HelloRequest(_name(header, "plan_id"), _field(header, "protocol", int))
    if kind == "evaluate":
        return request_id, EvaluateRequest(_name(header, "circuit"), *_planes(header, frame))
    if kind == "setup":
        return request_id, SetupRequest(_name(header, "circuit"))
    if kind == "hint":
        return request_id, HintRequest(_name(header, "circuit"))
    raise WorkerError(f"unknown request kind {kind[:40]!r}; a worker answers hello, evaluate, setup and hint")


def decode_reply(frame: Frame) -> tuple[int, Reply]:
    """Return (request id, reply). Raises WorkerError for anything but a well-formed reply; an ErrorReply is returned."""
    header = read_header(frame)
    request_id, kind = _field(header, "id", int), _field(header, "kind", str)
    if kind == "error":
        return request_id, ErrorReply(printable(_field(header, "message", str), MAX_ERROR_CHARACTERS))
    if kind == "evaluate":
        seconds = finite(header.get("seconds"))
        if seconds is None or seconds < 0:
            raise WorkerError("malformed message: seconds is no number of seconds")
        planes, bits = _planes(header, frame)
        return request_id, EvaluateReply(planes, seconds, bits)
    if kind == "hello":
        raw = _field(header, "circuits", dict)
        circuits = {_checked_name(name, "circuits"): _circuit(sizes) for name, sizes in raw.items()}
        plan_id, engine = _name(header, "plan_id"), _name(header, "engine")
        return request_id, WorkerInfo(plan_id, engine, circuits, _field(header, "protocol", int))
    raise WorkerError(f"unknown reply kind {kind[:40]!r}; is there a hecompile worker at this address?")


def _packed(planes: np.ndarray, bits: int | None) -> tuple[list[int], memoryview, memoryview]:
    """Return the shape of a header, and the payload in two parts."""
    if planes.dtype != np.uint8 or planes.ndim != 3:
        raise WorkerError(f"planes are {planes.dtype} of rank {planes.ndim}; needs uint8 [bytes, T, features]")
    bits = 8 * len(planes) if bits is None else bits
    if bytes_of(bits) != len(planes):
        raise WorkerError(f"words of {bits} bits are {bytes_of(bits)} planes of bytes, not {len(planes)}")
    whole, rest = pack(planes, bits)
    return [bits, *planes.shape[1:]], whole.data, rest.data


def _field(header: dict[str, Any], name: str, kind: type) -> Any:
    value = header.get(name)
    if type(value) is not kind:  # and not isinstance: JSON's true is no integer
        raise WorkerError(f"malformed message: {name} is {type(value).__name__}; needs {kind.__name__}")
    if kind is int and abs(header[name]) >= 1 << 63:
        raise WorkerError(f"malformed message: {name} is no integer of 64 bits")
    return value


def _name(header: dict[str, Any], name: str) -> str:
    return _checked_name(_field(header, name, str), name)


def _checked_name(value: str, name: str) -> str:
    if not 0 < len(value) <= MAX_NAME_CHARACTERS or not value.isascii() or not value.isprintable():
        raise WorkerError(f"malformed message: {name} is not 1 to {MAX_NAME_CHARACTERS} printable ASCII characters")
    return value


def _integers(value: Any, count: int, name: str) -> list[int]:
    if not isinstance(value, list) or len(value) != count:
        raise WorkerError(f"malformed message: {name} is not a list of {count} integers")
    if not all(type(item) is int and 0 < item < 1 << 32 for item in value):
        raise WorkerError(f"malformed message: {name} holds something else than integers from 1 to 2^32 - 1")
    return value


def _circuit(sizes: Any) -> CircuitInfo:
    info = CircuitInfo(*_integers(sizes, 4, "circuits"))
    _check_bits(info.upload_bits, "circuits")
    _check_bits(info.reply_bits, "circuits")
    return info


def _check_bits(bits: int, name: str) -> None:
    if not MIN_BITS <= bits <= MAX_BITS:
        raise WorkerError(f"malformed message: {name} has words of {bits} bits; needs {MIN_BITS} to {MAX_BITS}")


def _planes(header: dict[str, Any], frame: Frame) -> tuple[np.ndarray, int]:
    """Return the byte planes of a message and the bits of its words; memory is taken after the sizes are found to fit."""
    bits, tokens, features = _integers(header.get("shape"), 3, "shape")
    _check_bits(bits, "shape")
    values = tokens * features
    if (size := wire_bytes(bits, values)) != frame.payload_size:
        raise WorkerError(
            f"malformed message: shape {[bits, tokens, features]} is {size} bytes, the payload {frame.payload_size}"
        )
    whole = whole_bytes(bits, values)
    parts = (frame.payload, frame.rest) if len(frame.rest) else (frame.payload[:whole], frame.payload[whole:])
    first, rest = (np.frombuffer(part, dtype=np.uint8) for part in parts)
    return unpack(first, rest, bits, (tokens, features)), bits
