"""Define how both sides use Open Inference Protocol v2 over gRPC: a circuit is a model with one tensor in and one out.

    ModelInfer <circuit>          ciphertext UINT8 [limbs, T, in] → reply UINT8 [bytes, T, out], raw contents
    ModelInfer <circuit>.exact    without an input but with the parameter `public_rows`: the hint of the circuit (workers of
                                  this program only, see hecompile/bundles/public_rows.py)
    ModelMetadata, ModelConfig    the shapes; the parameter `plan_id` of every model's configuration
    ServerReady, ModelReady, RepositoryIndex

Names and shapes are those of the model repository in a worker bundle (hecompile/bundles/triton_repository.py), so that
any server of this protocol that reads it can be the worker. This module needs the packages of the extra `network`.
"""

from __future__ import annotations

import math

import numpy as np
from tritonclient.grpc import service_pb2 as messages

__all__ = [
    "COMPUTE_SECONDS",
    "DATATYPE",
    "PUBLIC_ROWS_PARAMETER",
    "SERVICE",
    "compute_seconds",
    "messages",
    "with_raw_contents",
]

_WIRE_TYPE_BYTES = 2
SERVICE = messages.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
DATATYPE = "UINT8"
COMPUTE_SECONDS = "compute_seconds"
"""Parameter of an answer: the engine's time, as a double."""

PUBLIC_ROWS_PARAMETER = "public_rows"
"""Parameter of a request: multiply by the public rows in the worker's bundle; the client sends no tensor."""


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
    tag = message.DESCRIPTOR.fields_by_name[name].number << 3 | _WIRE_TYPE_BYTES
    contents = np.ascontiguousarray(planes).reshape(-1).data
    return b"".join((message.SerializeToString(), _varint(tag), _varint(len(contents)), contents))


def _varint(value: int) -> bytes:
    """Encode an integer as protobuf does: seven bits per byte, lowest first, the eighth set on all but the last."""
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*digits, value])
