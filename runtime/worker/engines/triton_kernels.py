"""Turn bytes to balanced digits, and products to reply bytes, on the GPU: each in one pass over memory.

`split_digits` and `recombine` have the meaning and the signatures of those in torch_engine.py. This module is imported only
where Triton is installed (CUDA builds of torch bring it). The tests run both under Triton's interpreter, on the CPU, against
torch_engine.py, and compile them for sm_80 and sm_90 (Triton 3.7.0). They have run on no GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hecompile.word_sizes import bytes_of

BLOCK = 1024
"""Elements of one program: 8 a thread with the default of 4 warps. Not tuned on a GPU."""


@triton.jit
def _split(planes, digits, tokens, used, rows, features, LIMBS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rewrite words at BLOCK neighbouring positions of the padded [tokens, features]; the carry stays in registers."""
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    token = position // features
    feature = position % features
    inside = token < tokens
    known = inside & (feature < used)
    carry = tl.full([BLOCK], 0, dtype=tl.int32)
    for limb in tl.static_range(LIMBS):
        source = planes + (limb * tokens + token) * used + feature
        value = tl.load(source, mask=known, other=0).to(tl.int32) + carry  # 0 … 256
        carry = (value >= 128).to(tl.int32)
        tl.store(digits + (limb * tokens + token) * features + feature, (value - 256 * carry).to(tl.int8), mask=inside)
    # The rows beyond the last limb's; the grid covers them as well where they are more than the tokens.
    beyond = LIMBS * tokens * features + position
    zero = tl.full([BLOCK], 0, dtype=tl.int8)
    tl.store(digits + beyond, zero, mask=beyond < rows * features)


@triton.jit
def _recombine(  # type: ignore[no-untyped-def]
    low,
    high,
    reply,
    tokens,
    columns,
    stride,
    LIMBS: tl.constexpr,
    DIGITS: tl.constexpr,
    REPLY_BYTES: tl.constexpr,
    DROPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Shift, add and round BLOCK neighbouring words of [tokens, columns], and store them as bytes.

    DROPPED: lowest bits that are rounded away, and 0 in the reply.
    """
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    token = position // columns
    column = position % columns
    inside = token < tokens
    word = tl.full([BLOCK], (1 << DROPPED) >> 1, dtype=tl.int32)
    for limb in tl.static_range(LIMBS):
        word += tl.load(low + (limb * tokens + token) * stride + column, mask=inside, other=0) << (8 * limb)
    if DIGITS == 2:
        for limb in tl.static_range(LIMBS - 1):
            word += tl.load(high + (limb * tokens + token) * stride + column, mask=inside, other=0) << (8 * limb + 8)
    word = (word >> DROPPED) << DROPPED
    for place in tl.static_range(REPLY_BYTES):
        byte = (word >> (8 * (LIMBS - REPLY_BYTES + place))) & 255
        tl.store(reply + (place * tokens + token) * columns + column, byte.to(tl.uint8), mask=inside)


def split_digits(planes: Tensor, rows: int, features: int) -> Tensor:
    """See `torch_engine.split_digits`. planes: C order."""
    limbs, tokens, used = planes.shape
    digits = torch.empty(rows, features, dtype=torch.int8, device=planes.device)
    covered = max(tokens, rows - limbs * tokens)
    grid = (triton.cdiv(covered * features, BLOCK),)
    _split[grid](planes, digits, tokens, used, rows, features, LIMBS=limbs, BLOCK=BLOCK)
    return digits


def recombine(products: Sequence[Tensor], limbs: int, tokens: int, out_features: int, reply_bits: int) -> Tensor:
    """See `torch_engine.recombine`. products: C order, all of one width."""
    low, high = products[0], products[-1]
    reply_bytes = bytes_of(reply_bits)
    reply = torch.empty(reply_bytes, tokens, out_features, dtype=torch.uint8, device=low.device)
    _recombine[(triton.cdiv(tokens * out_features, BLOCK),)](
        low,
        high,
        reply,
        tokens,
        out_features,
        low.stride(0),
        LIMBS=limbs,
        DIGITS=len(products),
        REPLY_BYTES=reply_bytes,
        DROPPED=8 * limbs - reply_bits,
        BLOCK=BLOCK,
    )
    return reply
