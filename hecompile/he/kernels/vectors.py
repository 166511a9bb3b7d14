"""Give numba kernels vectors of eight lanes: LLVM's `<8 x double>`, `<8 x float>` and `<8 x i32>`.

numba's own vectorizer cannot prove that the points of a butterfly do not overlap, and falls back to scalar code. Here the
vector is explicit: eight features side by side, one per lane. LLVM splits a vector where the machine's are shorter, so the
code runs on any processor with the same result, bit for bit, fused multiply-add included.

Loads and stores take the address of a contiguous array (`address`), count in elements from there and are not
bounds-checked. They take addresses because numba counts references to an array wherever one is passed on, and would do so
for each vector. An address of float32 has a type of its own (`real_address`). By it `load_real`, `store_real`, `broadcast`
and `to_real` know the precision: a kernel written with them is compiled for either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.datamodel import models
from numba.core.extending import intrinsic as typed_intrinsic
from numba.core.extending import register_model

LANES = 8

intrinsic: Any = typed_intrinsic  # what it makes is called with an argument less than it is written with


class F8Type(types.Type):
    """Represent eight float64."""

    def __init__(self) -> None:
        super().__init__(name="hecompile.F8")


class I8Type(types.Type):
    """Represent eight int32; arithmetic wraps mod 2^32."""

    def __init__(self) -> None:
        super().__init__(name="hecompile.I8")


class S8Type(types.Type):
    """Represent eight float32."""

    def __init__(self) -> None:
        super().__init__(name="hecompile.S8")


class SingleAddressType(types.Type):
    """Represent the address of float32 that a kernel computes with."""

    def __init__(self) -> None:
        super().__init__(name="hecompile.SingleAddress")


F8, I8, S8, SINGLE_ADDRESS = F8Type(), I8Type(), S8Type(), SingleAddressType()
DOUBLES = ir.VectorType(ir.DoubleType(), LANES)
WORDS = ir.VectorType(ir.IntType(32), LANES)
BYTES = ir.VectorType(ir.IntType(8), LANES)
HALVES = ir.VectorType(ir.IntType(16), LANES)
LONGS = ir.VectorType(ir.IntType(64), LANES)
SINGLES = ir.VectorType(ir.FloatType(), LANES)


@register_model(F8Type)
class _F8Model(models.PrimitiveModel):
    def __init__(self, manager: Any, type_: types.Type) -> None:
        super().__init__(manager, type_, DOUBLES)


@register_model(I8Type)
class _I8Model(models.PrimitiveModel):
    def __init__(self, manager: Any, type_: types.Type) -> None:
        super().__init__(manager, type_, WORDS)


@register_model(S8Type)
class _S8Model(models.PrimitiveModel):
    def __init__(self, manager: Any, type_: types.Type) -> None:
        super().__init__(manager, type_, SINGLES)


@register_model(SingleAddressType)
class _SingleAddressModel(models.PrimitiveModel):
    def __init__(self, manager: Any, type_: types.Type) -> None:
        super().__init__(manager, type_, ir.IntType(64))


def _address_as(result: Callable[[Any], types.Type]) -> Any:
    @intrinsic
    def address(typing_context, array):  # type: ignore[no-untyped-def]
        if not isinstance(array, types.Array) or array.layout != "C":
            return None

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            data = cgutils.create_struct_proxy(signature.args[0])(context, builder, args[0]).data
            return builder.ptrtoint(data, ir.IntType(64))

        return result(array)(array), generate

    return address


address = _address_as(lambda array: types.int64)
"""Return where a contiguous array starts, as an integer. It holds as long as the array lives."""

real_address = _address_as(lambda array: SINGLE_ADDRESS if array.dtype == types.float32 else types.int64)
"""Return the address of an array of float64 or float32, typed so that a kernel computes in the array's precision."""


def _pointer(builder: Any, start: Any, index: Any, element: ir.Type, target: ir.Type) -> Any:
    first = builder.inttoptr(start, element.as_pointer())
    return builder.bitcast(builder.gep(first, [index]), target.as_pointer())


def _load_as(vector: ir.Type, size: int, result: types.Type, widen: Callable[[Any, Any], Any]) -> Any:
    @intrinsic
    def load(typing_context, start, index):  # type: ignore[no-untyped-def]
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            loaded = builder.load(_pointer(builder, args[0], args[1], vector.element, vector))
            loaded.align = size
            return widen(builder, loaded)

        return result(types.int64, types.int64), generate

    return load


def _store_as(vector: ir.Type, size: int, source: types.Type, narrow: Callable[[Any, Any], Any]) -> Any:
    @intrinsic
    def store(typing_context, start, index, value):  # type: ignore[no-untyped-def]
        if value != source:
            return None

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = _pointer(builder, args[0], args[1], vector.element, vector)
            builder.store(narrow(builder, args[2]), pointer, align=size)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, source), generate

    return store


@intrinsic
def load_real(typing_context, start, index):  # type: ignore[no-untyped-def]
    """Load eight numbers of the precision that `start` is an address of."""
    vector, size, result = (SINGLES, 4, S8) if start == SINGLE_ADDRESS else (DOUBLES, 8, F8)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        loaded = builder.load(_pointer(builder, args[0], args[1], vector.element, vector))
        loaded.align = size
        return loaded

    return result(_real_start(start), types.int64), generate


@intrinsic
def store_real(typing_context, start, index, value):  # type: ignore[no-untyped-def]
    """Store eight numbers of the precision that `start` is an address of."""
    vector, size, source = (SINGLES, 4, S8) if start == SINGLE_ADDRESS else (DOUBLES, 8, F8)
    if value != source:
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _pointer(builder, args[0], args[1], vector.element, vector), align=size)
        return context.get_dummy_value()

    return types.void(_real_start(start), types.int64, source), generate


def _real_start(start: types.Type) -> types.Type:
    return start if start == SINGLE_ADDRESS else types.int64


@intrinsic
def to_real(typing_context, words, start):  # type: ignore[no-untyped-def]
    """Convert int32 to the precision that `start` is an address of: exact in float64, rounded to nearest in float32."""
    if words != I8:
        return None
    vector, result = (SINGLES, S8) if start == SINGLE_ADDRESS else (DOUBLES, F8)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.sitofp(args[0], vector)

    return result(I8, _real_start(start)), generate


load_f64 = _load_as(DOUBLES, 8, F8, lambda builder, v: v)
load_f32 = _load_as(SINGLES, 4, F8, lambda builder, v: builder.fpext(v, DOUBLES))
load_i32 = _load_as(WORDS, 4, I8, lambda builder, v: v)
load_i8 = _load_as(BYTES, 1, I8, lambda builder, v: builder.sext(v, WORDS))
load_top_halves = _load_as(HALVES, 2, I8, lambda builder, v: _shifted_up(builder, v, 16))
"""Load eight halves as the top of words."""
load_middle_bytes = _load_as(BYTES, 1, I8, lambda builder, v: _shifted_up(builder, v, 8))
"""Load eight bytes as the second lowest of words."""
store_f64 = _store_as(DOUBLES, 8, F8, lambda builder, v: v)
store_f32 = _store_as(SINGLES, 4, F8, lambda builder, v: builder.fptrunc(v, SINGLES))
store_i32 = _store_as(WORDS, 4, I8, lambda builder, v: v)


def _shifted_up(builder: Any, value: Any, places: int) -> Any:
    return builder.shl(builder.zext(value, WORDS), ir.Constant(WORDS, [places] * LANES))


def _splat(builder: Any, scalar: Any, vector: ir.Type) -> Any:
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(WORDS, [0] * LANES)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)


@intrinsic
def splat(typing_context, scalar):  # type: ignore[no-untyped-def]
    """Put one float64 in all lanes."""
    if scalar != types.float64:
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _splat(builder, args[0], DOUBLES)

    return F8(types.float64), generate


@intrinsic
def broadcast(typing_context, start, index):  # type: ignore[no-untyped-def]
    """Put one number from memory, of the precision that `start` is an address of, in all lanes."""
    vector, result = (SINGLES, S8) if start == SINGLE_ADDRESS else (DOUBLES, F8)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        scalar = builder.load(_pointer(builder, args[0], args[1], vector.element, vector.element))
        return _splat(builder, scalar, vector)

    return result(_real_start(start), types.int64), generate


def _prefetch(write: int) -> Any:
    @intrinsic
    def prefetch(typing_context, start, offset):  # type: ignore[no-untyped-def]
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            number, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
            signature_ = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
            function = cgutils.get_or_insert_function(builder.module, signature_, "llvm.prefetch.p0")
            at = builder.inttoptr(builder.add(*args), pointer)
            builder.call(function, [at, number(write), number(3), number(1)])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return prefetch


prefetch = _prefetch(0)
"""Prefetch the cache line at byte `offset` from the address `start`, which need not be valid."""
prefetch_to_write = _prefetch(1)


@intrinsic
def load_low_bits(typing_context, start, end, count, place):  # type: ignore[no-untyped-def]
    """Load eight numbers of `count` bits each, at most 8, which end before byte `end` from the address `start`.

    The first is the lowest. They come as words, shifted up by `place`. Eight bytes are read, of which the last `count` hold
    the numbers: what lies before them must be readable, and what comes after need not.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        begin, end, count, place = args
        long, word = ir.IntType(64), ir.IntType(32)
        loaded = builder.load(_pointer(builder, begin, builder.sub(end, long(8)), ir.IntType(8), long))
        loaded.align = 1
        before = builder.mul(builder.sub(long(8), count), long(8))
        lanes = builder.mul(_splat(builder, count, LONGS), ir.Constant(LONGS, list(range(LANES))))
        shifts = builder.add(_splat(builder, before, LONGS), lanes)
        numbers = builder.trunc(builder.lshr(_splat(builder, loaded, LONGS), shifts), WORDS)
        mask = builder.trunc(builder.sub(builder.shl(long(1), count), long(1)), word)
        kept = builder.and_(numbers, _splat(builder, mask, WORDS))
        return builder.shl(kept, _splat(builder, builder.trunc(place, word), WORDS))

    return I8(types.int64, types.int64, types.int64, types.int64), generate
