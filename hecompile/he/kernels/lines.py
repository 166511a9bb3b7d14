"""Work on lines: the words of one token for 64 features, whose bytes of one plane are one cache line.

Eight stores of eight bytes each would do the same. But a core keeps only so many unfinished stores, and rows of wire bytes
are far apart in memory: one store per line halved the time of packing. The words stay in registers from the tile to the wire
or back, and the sums of verification are taken on the way.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.datamodel import models
from numba.core.extending import overload, register_model

from hecompile.he.kernels.vectors import I8, LANES, intrinsic

GROUPS = 8
"""Groups of eight features in a line."""

LINE_BYTES = 64
"""Bytes of a line in one plane: a cache line."""

SUM_LANES = 4
"""Number of int32 that hold the sum of one check: adding up a whole vector takes as long as the products in it."""

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_GROUP = ir.VectorType(_I32, LANES)
_WORDS = ir.VectorType(_I32, LANES * GROUPS)
_BYTES = ir.VectorType(_I8, LANES * GROUPS)


class LineType(types.Type):
    """Represent 64 int32; arithmetic wraps mod 2^32."""

    def __init__(self) -> None:
        super().__init__(name="hecompile.Line")


LINE = LineType()


@register_model(LineType)
class _LineModel(models.PrimitiveModel):
    def __init__(self, manager: Any, type_: types.Type) -> None:
        super().__init__(manager, type_, _WORDS)


@intrinsic
def line_of(typing_context, a, b, c, d, e, f, g, h):  # type: ignore[no-untyped-def]
    """Put eight groups of eight words side by side."""
    if not all(group == I8 for group in (a, b, c, d, e, f, g, h)):
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _join_all(builder, list(args))

    return LINE(*[I8] * GROUPS), generate


@intrinsic
def no_words(typing_context):  # type: ignore[no-untyped-def]
    """Return a line of zeros."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(_WORDS, None)

    return LINE(), generate


@intrinsic
def load_words(typing_context, words):  # type: ignore[no-untyped-def]
    """Load a line of 64 words that lie together, at the address `words`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], _WORDS.as_pointer()), align=4)

    return LINE(types.int64), generate


@intrinsic
def add_words(typing_context, line, words):  # type: ignore[no-untyped-def]
    """Add a line to 64 words that lie together, at the address `words`, mod 2^32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        line, words = args
        pointer = builder.inttoptr(words, _WORDS.as_pointer())
        builder.store(builder.add(builder.load(pointer, align=4), line), pointer, align=4)
        return context.get_dummy_value()

    return types.void(LINE, types.int64), generate


@intrinsic
def load_line(typing_context, tile, step):  # type: ignore[no-untyped-def]
    """Load a line from a tile: eight words at the address `tile`, the next eight `step` bytes further, and so on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tile, step = args
        return _join_all(builder, [builder.load(_at(builder, tile, step, g, _GROUP), align=4) for g in range(GROUPS)])

    return LINE(types.int64, types.int64), generate


@intrinsic(prefer_literal=True)
def group_of(typing_context, line, index):  # type: ignore[no-untyped-def]
    """Return eight of the words, from 8 · `index` on; `index` is a compile-time constant."""
    first = LANES * index.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _slice(builder, args[0], first, LANES)

    return I8(LINE, index), generate


@intrinsic
def top_of_line(typing_context, line, half, dropped):  # type: ignore[no-untyped-def]
    """Add `half` to the words and shift them down, unsigned, by `dropped` bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        line, half, dropped = args
        return builder.lshr(builder.add(line, _splat(builder, half)), _splat(builder, dropped))

    return LINE(LINE, types.int64, types.int64), generate


@intrinsic
def line_shifted_up(typing_context, line, bits):  # type: ignore[no-untyped-def]
    """Return the words times 2^bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.shl(args[0], _splat(builder, args[1]))

    return LINE(LINE, types.int64), generate


def _pack_line(align: int, past_the_caches: bool) -> Any:
    @intrinsic(prefer_literal=True)
    def pack_line(typing_context, limbs, line, out, plane):  # type: ignore[no-untyped-def]
        count = limbs.literal_value

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _, line, out, plane = args
            for limb in range(count):
                limb_bytes = builder.trunc(builder.lshr(line, _constant(8 * limb)), _BYTES)
                store = builder.store(limb_bytes, _at(builder, out, plane, limb, _BYTES), align=align)
                if past_the_caches:
                    store.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))
            return context.get_dummy_value()

        return types.void(limbs, LINE, types.int64, types.int64), generate

    return pack_line


pack_line = _pack_line(align=1, past_the_caches=False)
"""Store the lowest `limbs` bytes of the words, 64 bytes in each of as many planes.

`limbs` is a compile-time constant, `out` the address of the first plane's bytes; the next plane is `plane` bytes further.
"""

pack_line_past_caches = _pack_line(align=LINE_BYTES, past_the_caches=True)
"""Do as `pack_line` where `out` and `plane` are multiples of LINE_BYTES: whole lines go to memory, which need not be read
first. Other threads may read them after `stores_done`."""


@intrinsic
def stores_done(typing_context):  # type: ignore[no-untyped-def]
    """Wait for all stores of this thread: those past the caches are in no order with others.

    On x86 this is MFENCE or an instruction with LOCK. Either drains the buffers that combine such stores.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic(prefer_literal=True)
def unpack_line(typing_context, limbs, source, plane):  # type: ignore[no-untyped-def]
    """Invert `pack_line`: load words from `limbs` planes, the first at the address `source`; bytes above are 0."""
    count = limbs.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, source, plane = args
        line: Any = ir.Constant(_WORDS, None)
        for limb in range(count):
            limb_bytes = builder.load(_at(builder, source, plane, limb, _BYTES), align=1)
            line = builder.or_(line, builder.shl(builder.zext(limb_bytes, _WORDS), _constant(8 * limb)))
        return line

    return LINE(limbs, types.int64, types.int64), generate


def _add_dot(load_factors: Callable[[Any, Any], Any]) -> Any:
    @intrinsic
    def add_dot(typing_context, line, factors, sums):  # type: ignore[no-untyped-def]
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            line, factors, sums = args
            total = builder.mul(line, load_factors(builder, factors))
            while total.type.count > SUM_LANES:
                half = total.type.count // 2
                total = builder.add(_slice(builder, total, 0, half), _slice(builder, total, half, half))
            pointer = builder.inttoptr(sums, total.type.as_pointer())
            builder.store(builder.add(builder.load(pointer, align=4), total), pointer, align=4)
            return context.get_dummy_value()

        return types.void(LINE, types.int64, types.int64), generate

    return add_dot


add_dot = _add_dot(lambda builder, at: builder.load(builder.inttoptr(at, _WORDS.as_pointer()), align=4))
"""Add the Σ of words times int32 factors `[64]`, mod 2^32, to a sum int32 `[SUM_LANES]`; both are addresses."""

add_byte_dot = _add_dot(
    lambda builder, at: builder.sext(builder.load(builder.inttoptr(at, _BYTES.as_pointer()), align=1), _WORDS)
)
"""Do as `add_dot` with int8 factors."""


def _binary(operator_: Any, name: str) -> None:
    @intrinsic
    def operation(typing_context, a, b):  # type: ignore[no-untyped-def]
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return getattr(builder, name)(*args)

        return LINE(LINE, LINE), generate

    @overload(operator_, inline="always")
    def overloaded(a, b):  # type: ignore[no-untyped-def]
        if a == LINE and b == LINE:
            return lambda a, b: operation(a, b)
        return None


_binary(operator.add, "add")
_binary(operator.iadd, "add")
_binary(operator.sub, "sub")


def _at(builder: Any, start: Any, step: Any, index: int, vector: ir.Type) -> Any:
    return builder.inttoptr(builder.add(start, builder.mul(step, _I64(index))), vector.as_pointer())


def _join_all(builder: Any, parts: list[Any]) -> Any:
    while len(parts) > 1:
        parts = [_join(builder, parts[k], parts[k + 1]) for k in range(0, len(parts), 2)]
    return parts[0]


def _join(builder: Any, low: Any, high: Any) -> Any:
    lanes = list(range(2 * low.type.count))
    return builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))


def _slice(builder: Any, vector: Any, start: int, count: int) -> Any:
    lanes = ir.Constant(ir.VectorType(_I32, count), list(range(start, start + count)))
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), lanes)


def _constant(value: int) -> Any:
    return ir.Constant(_WORDS, [value] * _WORDS.count)


def _splat(builder: Any, scalar: Any) -> Any:
    one = builder.insert_element(ir.Constant(_WORDS, ir.Undefined), builder.trunc(scalar, _I32), _I32(0))
    zeros = ir.Constant(_WORDS, None)
    return builder.shuffle_vector(one, ir.Constant(_WORDS, ir.Undefined), zeros)
