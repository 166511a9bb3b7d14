"""Define how both sides use Open Inference Protocol v2 over gRPC: a circuit is a model with one tensor in and one out.

    ModelInfer <circuit>          ciphertext UINT8 [limbs, T, in] → reply UINT8 [bytes, T, out], raw contents
    ModelInfer <circuit>.exact    without an input but with the parameter `public_rows`: the hint of the circuit (workers of
                                  this program only, see hecompile/bundles/public_rows.py)
    ModelInfer <circuit>          without an input but with the parameter `hint`: the file of its hint, UINT8 [1, 1, bytes]
                                  (workers of this program only, see hecompile/bundles/hint_files.py)
    ModelMetadata, ModelConfig    the shapes; the parameter `plan_id` of every model's configuration
    ServerReady, ModelReady, RepositoryIndex

Names and shapes are those of the model repository in a worker bundle (hecompile/bundles/triton_repository.py), so that
any server of this protocol that reads it can be the worker. This module needs the packages of the extra `network`.
"""

from __future__ import annotations

import math

import numpy as np
from google.protobuf.message import DecodeError, Message
from tritonclient.grpc import service_pb2 as messages

from hecompile.runtime.wire.protobuf_fields import FIXED_BYTES, LENGTH_DELIMITED, prefix, read_varint

__all__ = [
    "COMPUTE_SECONDS",
    "DATATYPE",
    "HINT_PARAMETER",
    "MAX_REQUEST_BYTES",
    "MAX_RESPONSE_BYTES",
    "PUBLIC_ROWS_PARAMETER",
    "SERVICE",
    "UNCOMPRESSED",
    "compute_seconds",
    "fill",
    "messages",
    "with_raw_contents",
]

SERVICE = messages.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
DATATYPE = "UINT8"
COMPUTE_SECONDS = "compute_seconds"
"""Parameter of an answer: the engine's time, as a double."""

PUBLIC_ROWS_PARAMETER = "public_rows"
"""Parameter of a request: multiply by the public rows in the worker's bundle; the client sends no tensor."""

HINT_PARAMETER = "hint"
"""Parameter of a request: return the file of the circuit's hint; the client sends no tensor."""

UNCOMPRESSED = ("grpc.compression_enabled_algorithms_bitset", 1)
"""Option of a gRPC channel or server: messages come as they are. A compressed one may be a thousand times its bytes."""

MAX_REQUEST_BYTES, MAX_RESPONSE_BYTES = 64 << 10, 1 << 20
"""Most bytes of a message beside its tensor: a request names one circuit, a response may list all."""

_MOST_TENSORS = 16
_RAW_FIELDS = frozenset({"raw_input_contents", "raw_output_contents"})


def fill(message: Message, content: bytes, most: int) -> None:
    """Decode `content` into `message`, which is empty, after looking at the sizes of its parts.

    An empty part takes two bytes on the wire and a hundred in memory, so that a large message of nothing would fill it.

    Args:
        message: of any type of the protocol.
        content: bytes of somebody else.
        most: bytes that it may have beside its tensor.

    Raises:
        ValueError: it is another message, or larger.
    """
    raw = {field.number for field in message.DESCRIPTOR.fields if field.name in _RAW_FIELDS}
    if len(content) > most:
        _check_parts(content, raw, most)
    try:
        message.ParseFromString(content)
    except (DecodeError, RecursionError):
        raise ValueError("it is no message of this protocol") from None


def _check_parts(content: bytes, raw: set[int], most: int) -> None:
    """Raise ValueError where more than `most` bytes, or too many tensors, are in a message; stops as soon as it knows."""
    place, other, tensors = 0, 0, 0
    while place < len(content):
        start = place
        tag, place = read_varint(content, place)
        kind = tag & 7
        size = FIXED_BYTES.get(kind, 0)
        if kind == LENGTH_DELIMITED:
            size, place = read_varint(content, place)
        elif kind == 0:
            _, place = read_varint(content, place)
        elif size == 0:
            raise ValueError("it is no message of this protocol")
        place += size
        if kind == LENGTH_DELIMITED and tag >> 3 in raw:
            tensors += 1
        else:
            other += place - start
        if other > most or tensors > _MOST_TENSORS:
            raise ValueError("it is larger than any message of this protocol")


def compute_seconds(response: messages.ModelInferResponse) -> float:
    """Return the engine's time as the worker gives it; 0 where it gives none, as other programs do, or no sensible one."""
    seconds: float = (
        response.parameters[COMPUTE_SECONDS].double_param if COMPUTE_SECONDS in response.parameters else 0.0
    )
    return seconds if math.isfinite(seconds) and seconds >= 0 else 0.0


def with_raw_contents(message: messages.ModelInferRequest | messages.ModelInferResponse, planes: np.ndarray) -> bytes:
    """Serialise `message` with uint8 `planes` as its one raw content.

    Protobuf defines a message followed by more of its fields as the message with those fields. Setting the field and then
    serialising would copy the planes three times where this copies them once.
    """
    name = "raw_input_contents" if isinstance(message, messages.ModelInferRequest) else "raw_output_contents"
    number = message.DESCRIPTOR.fields_by_name[name].number
    contents = np.ascontiguousarray(planes).reshape(-1).data
    return b"".join((message.SerializeToString(), prefix(number, len(contents)), contents))
