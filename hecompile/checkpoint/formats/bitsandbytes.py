"""Dequantise weights that bitsandbytes has quantised to 4 or 8 bits; everything that it takes lies in the file.

    4 bits   w_i = map[q_i] · absmax[i // blocksize]     the high half of a byte first; absmax itself may be quantised alike,
             absmax_j = nested_map[a_j] · nested_absmax[j // nested_blocksize] + nested_offset
    8 bits   w_ij = q_ij · SCB_i / 127

Source: bitsandbytes 0.50, functional.py (dequantize_4bit, QuantState.as_dict), and Dettmers et al., LLM.int8, arXiv
2208.07339. The library's own code for CPUs is not used: where a row is no multiple of the block it returns other numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hecompile.checkpoint.formats.stored import Stored, cannot
from hecompile.foreign import parse_json

_STATE = ".quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_KINDS = ("nf4", "fp4")
_SCALES, _FORMAT = ".SCB", ".weight_format"
_MOST_STATE_BYTES, _MOST_BLOCK = 1 << 12, 1 << 16


@dataclass(frozen=True)
class _State:
    """Hold what the file says of a tensor of 4 bits. nested_blocksize: 0 where absmax is not quantised."""

    shape: tuple[int, ...]
    blocksize: int
    nested_blocksize: int
    nested_offset: float

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def blocks(self) -> int:
        return -(-self.count // self.blocksize)


def dequantised(place: Path, stored: dict[str, Stored]) -> dict[str, Stored]:
    """Put a tensor in the place of the several that quantisation has made of it; others stay as they are.

    Raises InputError for parts that do not belong together.
    """
    found = dict(stored)
    for name in stored:
        if _STATE in name:
            weight, _, kind = name.partition(_STATE)
            found[weight] = _four_bits(place, found, weight, kind)
        elif name.endswith(_SCALES):
            module = name.removesuffix(_SCALES)
            found[f"{module}.weight"] = _eight_bits(place, found, module)
    return found


def _four_bits(place: Path, found: dict[str, Stored], weight: str, kind: str) -> Stored:
    """Take the parts of a tensor of 4 bits out of `found`, and return the tensor."""
    state = _read_state(place, found.pop(f"{weight}{_STATE}{kind}"), weight)
    parts = {part: found.pop(f"{weight}.{part}") for part in _PARTS if f"{weight}.{part}" in found}
    packed = found.get(weight)
    nested = state.nested_blocksize > 0
    wanted = {"absmax": (state.blocks,), "quant_map": (16,)}
    if nested:
        wanted |= {"nested_absmax": (-(-state.blocks // state.nested_blocksize),), "nested_quant_map": (256,)}
    whole = packed is not None and packed.kind in _BYTES and math.prod(packed.shape) == (state.count + 1) // 2
    if kind not in _KINDS or not whole or {part: parts[part].shape for part in parts} != wanted:
        raise cannot(place, f"{weight} has parts of bitsandbytes that do not belong together")
    assert packed is not None

    def read() -> Tensor:
        absmax = parts["absmax"].read()
        if nested:
            table, scale = parts["nested_quant_map"].read(), parts["nested_absmax"].read()
            absmax = _spread(table[absmax.long()], scale, state.nested_blocksize) + state.nested_offset
        bytes_ = packed.read().to(torch.uint8).flatten()
        halves = torch.stack([bytes_ >> 4, bytes_ & 15], dim=1).flatten()[: state.count]
        return _spread(parts["quant_map"].read()[halves.long()], absmax, state.blocksize).reshape(state.shape)

    return Stored(state.shape, kind.upper(), True, read)


_BYTES = ("U8", "uint8")


def _spread(values: Tensor, scale: Tensor, blocksize: int) -> Tensor:
    """Multiply each block of values by its scale; the last block may be shorter."""
    padded = torch.cat([values, values.new_zeros(-len(values) % blocksize)]).reshape(-1, blocksize)
    return (padded * scale[:, None]).flatten()[: len(values)]


def _read_state(place: Path, stored: Stored, weight: str) -> _State:
    try:
        if stored.kind not in _BYTES or math.prod(stored.shape) > _MOST_STATE_BYTES:
            raise ValueError
        fields: Any = parse_json(bytes(stored.read().to(torch.uint8).flatten().tolist()))
        shape = tuple(fields["shape"])
        sizes = (*shape, fields["blocksize"], fields.get("nested_blocksize", 1))
        if (
            not all(type(size) is int and 0 < size < 1 << 31 for size in sizes)
            or max(sizes[len(shape) :]) > _MOST_BLOCK
        ):
            raise ValueError
        nested = "nested_blocksize" in fields
        offset = float(fields.get("nested_offset", 0.0))
        return _State(shape, fields["blocksize"], fields["nested_blocksize"] if nested else 0, offset)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise cannot(place, f"{weight} has a quant_state of bitsandbytes that cannot be read") from None


def _eight_bits(place: Path, found: dict[str, Stored], module: str) -> Stored:
    """Take the parts of a tensor of 8 bits out of `found`, and return the tensor."""
    scales, packed = found.pop(f"{module}{_SCALES}"), found.get(f"{module}.weight")
    layout = found.pop(f"{module}{_FORMAT}", None)
    in_rows = layout is None or (layout.shape in ((), (1,)) and float(layout.read().sum()) == 0.0)
    if packed is None or packed.kind not in ("I8", "int8") or scales.shape != packed.shape[:1] or not in_rows:
        raise cannot(place, f"{module}.weight has parts of bitsandbytes that do not belong together")
    return Stored(packed.shape, "INT8", True, lambda: packed.read() * (scales.read() / 127.0)[:, None])
