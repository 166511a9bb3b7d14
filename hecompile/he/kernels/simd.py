"""Compute on the vectors of `vectors.py`: eight lanes of float64, float32 or int32."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.extending import overload

from hecompile.he.kernels.vectors import DOUBLES, F8, I8, LANES, S8, SINGLES, WORDS, intrinsic


def _ternary(emit: Callable[..., Any]) -> Any:
    @intrinsic
    def operation(typing_context, a, b, c):  # type: ignore[no-untyped-def]
        if not a == b == c or a not in (F8, S8):
            return None

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return emit(builder, *args)

        return a(a, a, a), generate

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


def _emit_fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    vector, name = a.type, f"llvm.fma.v{LANES}f{32 if a.type == SINGLES else 64}"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector] * 3), name)
    return builder.call(function, [a, b, c])


def _emit_absolute(builder: Any, value: Any) -> Any:
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(DOUBLES, [DOUBLES]), f"llvm.fabs.v{LANES}f64"
    )
    return builder.call(function, [value])


_ROUND_TO_INTEGER = 1.5 * 2.0**52


def _emit_round(builder: Any, value: Any) -> Any:
    magic = ir.Constant(DOUBLES, [_ROUND_TO_INTEGER] * LANES)
    words = builder.bitcast(builder.fadd(value, magic), ir.VectorType(ir.IntType(64), LANES))
    return builder.trunc(words, WORDS)


fma = _ternary(_emit_fma)
"""a · b + c, rounded once."""

fnma = _ternary(lambda builder, a, b, c: _emit_fma(builder, builder.fneg(a), b, c))
"""c - a · b, rounded once."""

to_f64 = _unary(I8, F8, lambda builder, v: builder.sitofp(v, DOUBLES))
"""int32 → float64, exact."""

maximum = _pair(lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))
"""Larger of two, lane by lane; the second where one is not a number."""

absolute = _unary(F8, F8, _emit_absolute)


@intrinsic
def round_mod_2_32(typing_context, a):  # type: ignore[no-untyped-def]
    """Round |v| < 2^51 to the nearest integer, ties to even, mod 2^32.

    Adding 1.5 · 2^52 leaves the integer in the low bits of the mantissa.
    """
    if a not in (F8, S8):
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _emit_round(builder, builder.fpext(args[0], DOUBLES) if a == S8 else args[0])

    return I8(a), generate


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
_binary(operator.add, S8, lambda builder, a, b: builder.fadd(a, b))
_binary(operator.sub, S8, lambda builder, a, b: builder.fsub(a, b))
_binary(operator.mul, S8, lambda builder, a, b: builder.fmul(a, b))
_binary(operator.add, I8, lambda builder, a, b: builder.add(a, b))
_binary(operator.sub, I8, lambda builder, a, b: builder.sub(a, b))
