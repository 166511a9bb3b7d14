"""Encode and decode the messages of client and worker as frames of `hecompile.runtime.wire.framing`.

The header has `kind`, `id` and the fields of that kind; the payload is the byte planes, or nothing.

    request  hello     protocol, plan_id              reply  hello     protocol, plan_id, engine, circuits
             evaluate  circuit, shape [L, T, in]             evaluate  shape [R, T, out], seconds
             setup     circuit                               evaluate  shape [4, rank · ring_dim, out], seconds
                                                             error     message

Everything is checked before it is used: decoding returns a message or raises WorkerError, whatever bytes arrive.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hecompile.errors import WorkerError
from hecompile.foreign import finite, printable
from hecompile.runtime.wire.framing import Buffer, Frame, read_header

PROTOCOL_VERSION = 1
MAX_ERROR_CHARACTERS = 1000
MAX_NAME_CHARACTERS = 256


@dataclass(frozen=True)
class HelloRequest:
    """Open a connection: the client names the plan that it expects the worker to serve."""

    plan_id: str
    protocol: int = PROTOCOL_VERSION


@dataclass(frozen=True)
class EvaluateRequest:
    """Ask for the product of a circuit's weight and ciphertext planes, uint8 [upload_limbs, T, in_features]."""

    circuit: str
    planes: np.ndarray


@dataclass(frozen=True)
class SetupRequest:
    """Ask for the product of a circuit's weight and the public rows in the worker's bundle.

    See hecompile/bundles/public_rows.py.
    """

    circuit: str


@dataclass(frozen=True)
class CircuitInfo:
    """Hold the shape of one circuit as the worker announces it."""

    upload_limbs: int
    in_features: int
    reply_bytes: int
    out_features: int


@dataclass(frozen=True)
class WorkerInfo:
    """Answer hello: the worker's plan, engine and circuits."""

    plan_id: str
    engine: str
    circuits: Mapping[str, CircuitInfo]
    protocol: int = PROTOCOL_VERSION


@dataclass(frozen=True)
class EvaluateReply:
    """Answer with a product: planes uint8 [reply_bytes, T, out_features], and the engine's seconds on the worker's clock."""

    planes: np.ndarray
    compute_seconds: float


@dataclass(frozen=True)
class ErrorReply:
    """Refuse a request; the message says why and holds no byte of a payload."""

    message: str


Request = HelloRequest | EvaluateRequest | SetupRequest
Reply = WorkerInfo | EvaluateReply | ErrorReply


def encode(message: Request | Reply, request_id: int) -> Frame:
    """Return the frame of `message`. The payload shares memory with its planes."""
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
    """Return (request id, request). Raises WorkerError for anything but a well-formed request."""
    header = read_header(frame)
    request_id, kind = _field(header, "id", int), _field(header, "kind", str)
    if kind == "hello":
        return request_id, HelloRequest(_name(header, "plan_id"), _field(header, "protocol", int))
    if kind == "evaluate":
        return request_id, EvaluateRequest(_name(header, "circuit"), _planes(header, frame.payload))
    if kind == "setup":
        return request_id, SetupRequest(_name(header, "circuit"))
    raise WorkerError(f"unknown request kind {kind[:40]!r}; a worker answers hello, evaluate and setup")


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
        return request_id, EvaluateReply(_planes(header, frame.payload), seconds)
    if kind == "hello":
        raw = _field(header, "circuits", dict)
        circuits = {
            _checked_name(name, "circuits"): CircuitInfo(*_integers(sizes, 4, "circuits")) for name, sizes in raw.items()
        }
        plan_id, engine = _name(header, "plan_id"), _name(header, "engine")
        return request_id, WorkerInfo(plan_id, engine, circuits, _field(header, "protocol", int))
    raise WorkerError(f"unknown reply kind {kind[:40]!r}; is there a hecompile worker at this address?")


def _bytes_of(planes: np.ndarray) -> memoryview:
    if planes.dtype != np.uint8 or planes.ndim != 3:
        raise WorkerError(f"planes are {planes.dtype} of rank {planes.ndim}; needs uint8 [bytes, T, features]")
    return np.ascontiguousarray(planes).reshape(-1).data


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


def _planes(header: dict[str, Any], payload: Buffer) -> np.ndarray:
    shape = _integers(header.get("shape"), 3, "shape")
    if math.prod(shape) != len(payload):
        raise WorkerError(f"malformed message: shape {shape} is {math.prod(shape)} bytes, the payload {len(payload)}")
    return np.frombuffer(payload, dtype=np.uint8).reshape(shape)
