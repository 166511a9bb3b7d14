"""A token's words of a whole tile at once: 64 features, whose bytes of one plane are one cache line.

Eight stores of eight bytes each would do the same; but a core keeps only so many unfinished stores, and rows of wire bytes
are far apart in memory. One store per line halved the time of packing.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.extending import intrinsic as typed_intrinsic

GROUPS = 8
"""Groups of eight features in a line."""

intrinsic: Any = typed_intrinsic  # what it makes is called with an argument less than it is written with

SUM_LANES = 4
"""Numbers that make up the sum of a check while it grows."""

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_GROUP = ir.VectorType(_I32, 8)
_WORDS = ir.VectorType(_I32, 16)
_LINE = ir.VectorType(_I8, 64)
_WORD_BYTES = 4 * 16


def _prefetch(write: int) -> Any:
    @intrinsic
    def prefetch(typing_context, start, offset):  # type: ignore[no-untyped-def]
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = builder.inttoptr(builder.add(*args), _I8.as_pointer())
            signature_ = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
            function = cgutils.get_or_insert_function(builder.module, signature_, "llvm.prefetch.p0")
            builder.call(function, [pointer, _I32(write), _I32(3), _I32(1)])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return prefetch


prefetch = _prefetch(0)
"""Asks for the cache line at byte `offset` from the address `start`, which need not be valid."""
prefetch_to_write = _prefetch(1)


@intrinsic(prefer_literal=True)
def pack_line(typing_context, limbs, tile, step, half, dropped, out, plane, factors, next_factors, checks, sums):  # type: ignore[no-untyped-def]
    """Byte planes of 64 words plus `half`, from byte dropped/8 up: 64 bytes in each of `limbs` planes.

    limbs: compile-time constant. tile: address of the first eight words, the next ones `step` bytes further each time;
    out: address of the first plane's bytes, the next plane's `plane` bytes further.
    For each of `checks`, the sums grow by those words without the bytes that are not sent, (word + half) >> dropped, times
    int32 factors: see `_add_to_sums`.
    """
    count = limbs.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, tile, step, half, dropped, out, plane, factors, next_factors, checks, sums = args
        addend, shift = _splat(builder, half), _splat(builder, dropped)
        words = [builder.lshr(builder.add(word, addend), shift) for word in _load_words(builder, tile, step)]
        for limb in range(count):
            bits = ir.Constant(_WORDS, [8 * limb] * 16)
            parts = [builder.trunc(builder.lshr(word, bits), ir.VectorType(_I8, 16)) for word in words]
            line = _join(builder, _join(builder, parts[0], parts[1]), _join(builder, parts[2], parts[3]))
            builder.store(line, _at(builder, out, plane, limb, _LINE), align=1)
        _add_to_sums(builder, words, factors, next_factors, checks, sums)
        return context.get_dummy_value()

    return types.void(limbs, *[types.int64] * 10), generate


@intrinsic(prefer_literal=True)
def unpack_line(typing_context, limbs, source, plane, dropped, tile, step, factors, checks, sums):  # type: ignore[no-untyped-def]
    """The reverse: 64 words, byte l of which, counted from byte dropped/8 up, is that of plane l.

    checks: 0 or 1. The sums grow by the words before they are shifted up by `dropped`.
    """
    count = limbs.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, source, plane, dropped, tile, step, factors, checks, sums = args
        shift = _splat(builder, dropped)
        words: list[Any] = [ir.Constant(_WORDS, None)] * 4
        for limb in range(count):
            line = builder.load(_at(builder, source, plane, limb, _LINE), align=1)
            bits = ir.Constant(_WORDS, [8 * limb] * 16)
            for k in range(4):
                part = builder.zext(_slice(builder, line, 16 * k, 16), _WORDS)
                words[k] = builder.or_(words[k], builder.shl(part, bits))
        for g in range(GROUPS):
            group = _slice(builder, builder.shl(words[g // 2], shift), 8 * (g % 2), 8)
            builder.store(group, _at(builder, tile, step, g, _GROUP), align=4)
        _add_to_sums(builder, words, factors, _I64(0), checks, sums)
        return context.get_dummy_value()

    return types.void(limbs, *[types.int64] * 8), generate


def _add_to_sums(builder: Any, words: list[Any], factors: Any, next_factors: Any, checks: Any, sums: Any) -> None:
    """For c < checks: SUM_LANES numbers at sums + 16·c, int32, grow by the 64 words times the 64 factors at factors +
    next_factors·c, all mod 2^32; it is their total that counts. A whole reduction would take longer than all the rest."""
    with cgutils.for_range(builder, checks) as loop:
        factors_ = builder.add(factors, builder.mul(next_factors, loop.index))
        total: Any = None
        for k, word in enumerate(words):
            factor = builder.load(_at(builder, factors_, _I64(_WORD_BYTES), k, _WORDS), align=4)
            product = builder.mul(word, factor)
            total = product if total is None else builder.add(total, product)
        for lanes in (8, SUM_LANES):
            total = builder.add(_slice(builder, total, 0, lanes), _slice(builder, total, lanes, lanes))
        at = _at(builder, builder.add(sums, builder.mul(loop.index, _I64(4 * SUM_LANES))), _I64(0), 0, total.type)
        builder.store(builder.add(builder.load(at, align=4), total), at, align=4)


def _at(builder: Any, start: Any, step: Any, index: int, vector: ir.Type) -> Any:
    return builder.inttoptr(builder.add(start, builder.mul(step, _I64(index))), vector.as_pointer())


def _load_words(builder: Any, tile: Any, step: Any) -> list[Any]:
    groups = [builder.load(_at(builder, tile, step, g, _GROUP), align=4) for g in range(GROUPS)]
    return [_join(builder, groups[g], groups[g + 1]) for g in range(0, GROUPS, 2)]


def _join(builder: Any, low: Any, high: Any) -> Any:
    lanes = list(range(2 * low.type.count))
    return builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))


def _slice(builder: Any, vector: Any, start: int, count: int) -> Any:
    lanes = ir.Constant(ir.VectorType(_I32, count), list(range(start, start + count)))
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), lanes)


def _splat(builder: Any, scalar: Any) -> Any:
    one = builder.insert_element(ir.Constant(_WORDS, ir.Undefined), builder.trunc(scalar, _I32), _I32(0))
    return builder.shuffle_vector(one, ir.Constant(_WORDS, ir.Undefined), ir.Constant(_WORDS, None))
