"""Find the output head of a graph, and keep its digest where its weight does not stay."""

from __future__ import annotations

import hashlib

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import Tensor

from hecompile.graph.ir import constant_of, in_block, nodes_of_type

HEAD_DIGEST = "hecompile.head_digest"
"""Metadata key of a model whose head is remote: `head_digest` of the weight that the checkpoint has."""


def head_digest(head: Tensor | NDArray[np.floating]) -> str:
    """Hash the shape and some rows, evenly spaced, of a head's weight [V, H], in float32: SHA-256 in hex."""
    rows = head[:: max(1, len(head) // 256)]
    floats = rows.detach().float().numpy() if isinstance(rows, Tensor) else rows
    values = np.ascontiguousarray(floats, dtype=np.float32)
    return hashlib.sha256(repr(tuple(head.shape)).encode() + values.tobytes()).hexdigest()


def head_shape(model: ir.Model) -> tuple[int, int] | None:
    """Return (V, H) of the output head of a canonical graph, None without one.

    It is the last Linear outside of the decoder's layers.
    """
    node = _head(model)
    weight = None if node is None else node.inputs[1]
    if weight is None or weight.shape is None:
        return None
    vocabulary, hidden = weight.shape.numpy()
    return int(vocabulary), int(hidden)


def keep_head_digest(model: ir.Model) -> None:
    """Write the digest of the head's weight into the model's metadata, before the weight is changed."""
    node = _head(model)
    weight = None if node is None else constant_of(node.inputs[1])
    if weight is not None:
        model.metadata_props[HEAD_DIGEST] = head_digest(weight)


def _head(model: ir.Model) -> ir.Node | None:
    return next((node for node in reversed(list(nodes_of_type(model, "Linear"))) if not in_block(node)), None)
