"""Vectors of eight lanes for numba kernels: what LLVM calls `<8 x double>` and `<8 x i32>`.

numba's own vectorizer cannot prove that the points of a butterfly do not overlap and falls back to scalar code. Here the
vector is said outright: eight features side by side, one per lane. LLVM splits a vector where the machine's are shorter,
so the code runs on any processor with the same result, bit for bit, fused multiply-add included.

Loads and stores take the address of a contiguous array (`address`), count in elements from there and are not
bounds-checked. Addresses and not arrays, because numba counts references to an array wherever one is passed on, and would
do so for each vector.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.datamodel import models
from numba.core.extending import intrinsic as typed_intrinsic
from numba.core.extending import overload, register_model

LANES = 8

intrinsic: Any = typed_intrinsic  # what it makes is called with an argument less than it is written with


class F8Type(types.Type):
    """Eight float64."""

    def __init__(self) -> None:
        super().__init__(name="hecompile.F8")


class I8Type(types.Type):
    """Eight int32; arithmetic wraps mod 2^32."""

    def __init__(self) -> None:
        super().__init__(name="hecompile.I8")


F8, I8 = F8Type(), I8Type()
_F8 = ir.VectorType(ir.DoubleType(), LANES)
_I8 = ir.VectorType(ir.IntType(32), LANES)
_BYTES = ir.VectorType(ir.IntType(8), LANES)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)


@register_model(F8Type)
class _F8Model(models.PrimitiveModel):
    def __init__(self, manager: Any, type_: types.Type) -> None:
        super().__init__(manager, type_, _F8)


@register_model(I8Type)
class _I8Model(models.PrimitiveModel):
    def __init__(self, manager: Any, type_: types.Type) -> None:
        super().__init__(manager, type_, _I8)


@intrinsic
def address(typing_context, array):  # type: ignore[no-untyped-def]
    """Where a contiguous array starts, as an integer. It holds as long as the array lives."""
    if not isinstance(array, types.Array) or array.layout != "C":
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = cgutils.create_struct_proxy(signature.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(data, ir.IntType(64))

    return types.int64(array), generate


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


load_f64 = _load_as(_F8, 8, F8, lambda builder, v: v)
load_f32 = _load_as(_FLOATS, 4, F8, lambda builder, v: builder.fpext(v, _F8))
load_i32 = _load_as(_I8, 4, I8, lambda builder, v: v)
load_i8 = _load_as(_BYTES, 1, I8, lambda builder, v: builder.sext(v, _I8))
load_u8 = _load_as(_BYTES, 1, I8, lambda builder, v: builder.zext(v, _I8))
store_f64 = _store_as(_F8, 8, F8, lambda builder, v: v)
store_f32 = _store_as(_FLOATS, 4, F8, lambda builder, v: builder.fptrunc(v, _FLOATS))
store_i32 = _store_as(_I8, 4, I8, lambda builder, v: v)
store_u8 = _store_as(_BYTES, 1, I8, lambda builder, v: builder.trunc(v, _BYTES))


def _splat(builder: Any, scalar: Any, vector: ir.Type) -> Any:
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(_I8, [0] * LANES)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)


@intrinsic
def splat(typing_context, scalar):  # type: ignore[no-untyped-def]
    """One float64 in all lanes."""
    if scalar != types.float64:
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _splat(builder, args[0], _F8)

    return F8(types.float64), generate


@intrinsic
def broadcast(typing_context, start, index):  # type: ignore[no-untyped-def]
    """One float64 from memory in all lanes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        scalar = builder.load(_pointer(builder, args[0], args[1], ir.DoubleType(), ir.DoubleType()))
        return _splat(builder, scalar, _F8)

    return F8(types.int64, types.int64), generate


@intrinsic
def splat_i32(typing_context, scalar):  # type: ignore[no-untyped-def]
    """One integer, mod 2^32, in all lanes."""
    if not isinstance(scalar, types.Integer):
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _splat(builder, builder.trunc(args[0], ir.IntType(32)), _I8)

    return I8(types.int64), generate


def _prefetch(write: int, level: int) -> Any:
    @intrinsic
    def prefetch(typing_context, start, offset):  # type: ignore[no-untyped-def]
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            number, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
            signature_ = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
            function = cgutils.get_or_insert_function(builder.module, signature_, "llvm.prefetch.p0")
            at = builder.inttoptr(builder.add(*args), pointer)
            builder.call(function, [at, number(write), number(level), number(1)])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return prefetch


prefetch = _prefetch(0, 3)
"""Asks for the cache line at byte `offset` from the address `start`, which need not be valid."""
prefetch_to_write = _prefetch(1, 3)
prefetch_far = _prefetch(0, 3)
"""The same, but no nearer than the second-level cache."""


def _ternary(result: types.Type, emit: Callable[..., Any]) -> Any:
    @intrinsic
    def operation(typing_context, a, b, c):  # type: ignore[no-untyped-def]
        if not a == b == c == F8:
            return None

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return emit(builder, *args)

        return result(F8, F8, F8), generate

    return operation


def _pair(emit: Callable[..., Any]) -> Any:
    @intrinsic
    def operation(typing_context, a, b):  # type: ignore[no-untyped-def]
        if not a == b == F8:
            return None

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return emit(builder, *args)

        return F8(F8, F8), generate

    return operation


def _unary(source: types.Type, result: types.Type, emit: Callable[..., Any]) -> Any:
    @intrinsic
    def operation(typing_context, a):  # type: ignore[no-untyped-def]
        if a != source:
            return None

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return emit(builder, args[0])

        return result(source), generate

    return operation


def _shift(emit: Callable[..., Any]) -> Any:
    @intrinsic
    def operation(typing_context, a, bits):  # type: ignore[no-untyped-def]
        if a != I8 or not isinstance(bits, types.Integer):
            return None

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return emit(builder, args[0], _splat(builder, builder.trunc(args[1], ir.IntType(32)), _I8))

        return I8(I8, types.int64), generate

    return operation


def _emit_fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_F8, [_F8] * 3), f"llvm.fma.v{LANES}f64")
    return builder.call(function, [a, b, c])


def _emit_absolute(builder: Any, value: Any) -> Any:
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_F8, [_F8]), f"llvm.fabs.v{LANES}f64")
    return builder.call(function, [value])


_ROUND_TO_INTEGER = 1.5 * 2.0**52


def _emit_round(builder: Any, value: Any) -> Any:
    magic = ir.Constant(_F8, [_ROUND_TO_INTEGER] * LANES)
    words = builder.bitcast(builder.fadd(value, magic), ir.VectorType(ir.IntType(64), LANES))
    return builder.trunc(words, _I8)


fma = _ternary(F8, _emit_fma)
"""a · b + c, rounded once."""

fnma = _ternary(F8, lambda builder, a, b, c: _emit_fma(builder, builder.fneg(a), b, c))
"""c - a · b, rounded once."""

to_f64 = _unary(I8, F8, lambda builder, v: builder.sitofp(v, _F8))
"""int32 → float64, exact."""

maximum = _pair(lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))
"""Lane by lane; the second where one is not a number."""

absolute = _unary(F8, F8, _emit_absolute)

round_mod_2_32 = _unary(F8, I8, _emit_round)
"""|v| < 2^51 → the nearest integer (ties to even) mod 2^32: adding 1.5 · 2^52 leaves it in the low mantissa bits."""

shift_left = _shift(lambda builder, v, bits: builder.shl(v, bits))
shift_right = _shift(lambda builder, v, bits: builder.lshr(v, bits))
"""Of the word read as unsigned."""


def _binary(operator_: Any, vector: types.Type, emit: Callable[..., Any]) -> None:
    @intrinsic
    def operation(typing_context, a, b):  # type: ignore[no-untyped-def]
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return emit(builder, *args)

        return vector(vector, vector), generate

    @overload(operator_, inline="always")
    def overloaded(a, b):  # type: ignore[no-untyped-def]
        if a == vector and b == vector:
            return lambda a, b: operation(a, b)
        return None


_binary(operator.add, F8, lambda builder, a, b: builder.fadd(a, b))
_binary(operator.sub, F8, lambda builder, a, b: builder.fsub(a, b))
_binary(operator.mul, F8, lambda builder, a, b: builder.fmul(a, b))
_binary(operator.add, I8, lambda builder, a, b: builder.add(a, b))
_binary(operator.sub, I8, lambda builder, a, b: builder.sub(a, b))
_binary(operator.or_, I8, lambda builder, a, b: builder.or_(a, b))
