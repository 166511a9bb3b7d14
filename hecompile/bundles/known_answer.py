"""Derive the circuit `known_answer` of every worker bundle, and its exact reply, from the plan id.

It is one extreme linear with nothing secret in it. A worker is only as exact as its machine: x86 without VNNI saturates
pairs of uint8 × int8 products at ±32767, some servers accumulate in float. Each changes a byte of this reply, so the client
asks for it at every connection.
"""

from __future__ import annotations

import hashlib

import numpy as np

from hecompile.bundles.circuit_reference import encrypted_linear_reference
from hecompile.word_sizes import bytes_of

KNOWN_ANSWER = "known_answer"
KNOWN_ANSWER_BITS = 32
KNOWN_ANSWER_REPLY_BITS = 24  # so that the reply is also rounded
KNOWN_ANSWER_SHAPE = (5, 1031, 37)
"""(T, in, out). Sums over 1031 features pass 2^24, where float32 loses the lowest bit, and some of them are odd; 1031
is prime, so every vector kernel meets its remainder loop."""


def known_answer_weight(plan_id: str) -> np.ndarray:
    """Return the weight, int8 [1031, 37]: columns 0 to 4 are fixed extremes, the rest is drawn from `plan_id`."""
    _, in_features, out_features = KNOWN_ANSWER_SHAPE
    drawn = _expand(plan_id, "weight", in_features * out_features).reshape(in_features, out_features)
    values = np.array([127, -127, -128], dtype=np.int8)[drawn % 3]
    values[:, :3] = 127, -128, -127
    values[0::2, 3], values[1::2, 3] = 127, -128  # neighbours nearly cancel
    values[0::4, 4], values[1::4, 4], values[2::4, 4], values[3::4, 4] = 127, 127, -128, -128  # pairs do
    return values


def known_answer_vector(plan_id: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (planes uint8 [4, 5, 1031], expected reply uint8 [3, 5, 37]) of the plan, computed exactly in int64.

    Token 0 is all 255, token 1 all 0, token 2 alternates, the rest is drawn from {0, 255} by `plan_id`.
    """
    tokens, in_features, _ = KNOWN_ANSWER_SHAPE
    limbs = bytes_of(KNOWN_ANSWER_BITS)
    drawn = _expand(plan_id, "planes", limbs * tokens * in_features) & 1
    planes = (drawn * 255).astype(np.uint8).reshape(limbs, tokens, in_features)
    planes[:, 0, :] = 255
    planes[:, 1, :] = 0
    planes[:, 2, 0::2], planes[:, 2, 1::2] = 255, 0
    return planes, encrypted_linear_reference(planes, known_answer_weight(plan_id), KNOWN_ANSWER_REPLY_BITS)


def _expand(plan_id: str, label: str, count: int) -> np.ndarray:
    """Draw `count` bytes from SHAKE-256 of the plan: the same on every platform and numpy version."""
    stream = hashlib.shake_256(f"hecompile known answer v1 {label} {plan_id}".encode()).digest(count)
    return np.frombuffer(stream, dtype=np.uint8)
