"""Look up 64 bytes at a time in tables of 256, by the byte permutations of AVX512-VBMI."""

from __future__ import annotations

from functools import cache
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba.core import cgutils, types

from hecompile.he.kernels.vectors import intrinsic

LANES = 64

_I16, _I64 = ir.IntType(16), ir.IntType(64)
_BYTES = ir.VectorType(ir.IntType(8), LANES)
_PLACES = ir.VectorType(_I16, 32)
_QUARTERS = 4


@cache
def supported() -> bool:
    """Return whether this machine has the instructions of `step_sample`."""
    features = llvmlite.binding.get_host_cpu_features()
    return all(features.get(name, False) for name in ("avx512f", "avx512bw", "avx512vbmi", "avx512vbmi2"))


@intrinsic
def step_sample(typing_context, high, second, tables, samples, low, base, places):  # type: ignore[no-untyped-def]
    """Compute sample = before[high] + (low > step[high]) in 64 lanes, and list the lanes in which that is not valid.

    A low byte is taken from the bytes at `second`, in order, in lanes whose step is not 255 or whose `before` is 127. In the
    others it is 0. There is no branch, because no processor could foresee it.

    Args:
        high: address of uint8 `[64]`.
        second: address of as many readable bytes.
        tables: address of `before`, int8 `[256]`, and `step`, uint8 `[256]`, one after the other.
        samples: address of int8 `[64]`, written.
        low: address of uint8 `[64]`, written.
        base: added to the listed lanes.
        places: address of uint16, written: `base` + lane for each lane where low equals the step or `before` is 127, and up
            to 32 arbitrary entries after those.

    Returns:
        How many lanes are listed, plus 2^32 times the bytes used of `second`.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        high, second, tables, samples, low, base, places = args
        index = _load(builder, high)
        upper = builder.icmp_signed("<", index, ir.Constant(_BYTES, None))  # index ≥ 128
        before = _look_up(builder, tables, 0, index, upper)
        step = _look_up(builder, tables, 256, index, upper)
        marked = builder.icmp_unsigned("==", before, ir.Constant(_BYTES, [127] * LANES))
        stepped = builder.icmp_unsigned("!=", step, ir.Constant(_BYTES, [255] * LANES))
        wanted = builder.or_(stepped, marked)
        expand = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(_BYTES, [_BYTES, _BYTES, ir.VectorType(ir.IntType(1), LANES)]),
            "llvm.x86.avx512.mask.expand.v64i8",
        )
        lows = builder.call(expand, [_load(builder, second), ir.Constant(_BYTES, None), wanted])
        builder.store(lows, _pointer(builder, low, 0), align=1)
        above = builder.sext(builder.icmp_unsigned(">", lows, step), _BYTES)  # -1 where it is
        builder.store(builder.sub(before, above), _pointer(builder, samples, 0), align=1)
        equal = builder.and_(builder.icmp_unsigned("==", lows, step), stepped)
        mask = builder.bitcast(builder.or_(equal, marked), _I64)
        used = builder.shl(builder.ctpop(builder.bitcast(wanted, _I64)), _I64(32))
        count: Any = ir.Constant(_I64, 0)
        for half in (0, 32):
            lanes = builder.trunc(builder.lshr(mask, _I64(half)), ir.IntType(32))
            to = builder.add(places, builder.mul(count, _I64(2)))
            _store_places(builder, lanes, builder.add(base, _I64(half)), to)
            count = builder.add(count, builder.zext(builder.ctpop(lanes), _I64))
        return builder.or_(count, used)

    return types.int64(*[types.int64] * 7), generate


def _store_places(builder: Any, lanes: Any, base: Any, to: Any) -> None:
    """Store `base` + k for each bit k of the 32-bit mask `lanes`, as uint16, one after the other."""
    first = builder.insert_element(ir.Constant(_PLACES, ir.Undefined), builder.trunc(base, _I16), ir.IntType(32)(0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), 32), None)
    bases = builder.shuffle_vector(first, ir.Constant(_PLACES, ir.Undefined), zeros)
    places = builder.add(bases, ir.Constant(_PLACES, list(range(32))))
    bits = ir.VectorType(ir.IntType(1), 32)
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_PLACES, [_PLACES, _PLACES, bits]), "llvm.x86.avx512.mask.compress.v32i16"
    )
    packed = builder.call(function, [places, ir.Constant(_PLACES, None), builder.bitcast(lanes, bits)])
    builder.store(packed, builder.inttoptr(to, _PLACES.as_pointer()), align=2)


def _pointer(builder: Any, start: Any, offset: int) -> Any:
    return builder.inttoptr(builder.add(start, ir.Constant(ir.IntType(64), offset)), _BYTES.as_pointer())


def _load(builder: Any, start: Any, offset: int = 0) -> Any:
    return builder.load(_pointer(builder, start, offset), align=1)


def _look_up(builder: Any, tables: Any, offset: int, index: Any, upper: Any) -> Any:
    """Return table[index] for the 256 bytes at `offset`: one permutation for each half, chosen by the index's top bit."""
    quarters = [_load(builder, tables, offset + LANES * k) for k in range(_QUARTERS)]
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_BYTES, [_BYTES] * 3), "llvm.x86.avx512.vpermi2var.qi.512"
    )
    first = builder.call(function, [quarters[0], index, quarters[1]])
    second = builder.call(function, [quarters[2], index, quarters[3]])
    return builder.select(upper, second, first)
