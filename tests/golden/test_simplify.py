"""Removing what the exporter adds: its text, its meaning, what is left alone and what is refused."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch

from hecompile.errors import LegalityError
from hecompile.ir import print_model
from hecompile.legality import EXPORTED
from tests.golden.graphs import evaluate, gaussian, parse, run_pass

NOISY = """
noisy (float[batch,sequence,8] x) => (float[batch,sequence,8] y)
<int64[1] zero = {0}, int64[1] end = {9223372036854775807}, int64[1] axis = {2}, int64[1] step = {1},
 float one = {1.0}, int64[1] four = {4}, int64[1] two = {2},
 float[batch,sequence,8] whole, float[batch,sequence,4,2] heads>
{
    whole = Slice (x, zero, end, axis, step)
    scaled = Mul (one, whole)
    same = Identity (scaled)
    batch = Shape <start: int = 0, end: int = 1> (x)
    sequence = Shape <start: int = 1, end: int = 2> (x)
    shape = Concat <axis: int = 0> (batch, sequence, four, two)
    heads = Reshape <allowzero: int = 1> (same, shape)
    cast = Cast <to: int = 1> (heads)
    again = Cast <to: int = 1> (heads)
    sum = Add (cast, again)
    back = Concat <axis: int = 0> (batch, sequence, end_shape)
    end_shape = Constant <value_ints: ints = [8]> ()
    y = Reshape <allowzero: int = 1> (sum, back)
}
"""


def noisy() -> ir.Model:
    model = parse(
        NOISY.replace("    end_shape = Constant <value_ints: ints = [8]> ()\n", "").replace(
            "    back =", "    end_shape = Constant <value_ints: ints = [8]> ()\n    back ="
        ),
        {"heads": "model.layers.0.self_attn", "y": "model.layers.0.self_attn"},
    )
    return model
