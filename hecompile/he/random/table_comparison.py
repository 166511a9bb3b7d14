"""Decide 64 samples at a time by their top bytes, with comparisons: on any processor, and fast on those with AVX2.

A look-up per sample would do as well, but for its branch: one sample in 14 wants a second byte, and no processor foresees
which.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.core import types

from hecompile.he.kernels.vectors import intrinsic
from hecompile.he.random.table_lookup import LANES

_I64 = ir.IntType(64)
_BYTES = ir.VectorType(ir.IntType(8), LANES)


def top_byte_samples(before: Sequence[int], wanted: Sequence[bool]) -> Any:
    """Make an intrinsic that looks up 64 top bytes in the table `before`.

    It takes the addresses of top bytes, uint8 `[64]`, and of samples, int8 `[64]`. It fills the samples and returns the
    mask of the lanes in which a second byte is wanted and the sample is not valid.

    Args:
        before: the sample for each top byte, growing by ones.
        wanted: for each top byte, whether a second byte is wanted; `before` does not matter there.

    Raises:
        ValueError: the table does not grow by ones.
    """
    known = [value for value, want in zip(before, wanted, strict=True) if not want]
    values, last = [], known[0]
    for value, want in zip(before, wanted, strict=True):
        last = last if want else value
        values.append(last)
    steps = [(cell, values[cell] - values[cell - 1]) for cell in range(1, 256) if values[cell] != values[cell - 1]]
    if any(size != 1 for _, size in steps):
        raise ValueError("the table does not grow by ones")

    @intrinsic
    def samples_of(typing_context, top, samples):  # type: ignore[no-untyped-def]
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            byte = builder.load(builder.inttoptr(args[0], _BYTES.as_pointer()), align=1)
            byte = builder.xor(byte, _constant(-128))  # AVX2 compares signed bytes alone
            sample: Any = _constant(values[0])
            for cell, _ in steps:
                above = builder.icmp_signed(">", byte, _constant(cell - 1 - 128))
                sample = builder.sub(sample, builder.sext(above, _BYTES))  # an answer is 0 or -1
            open_: Any = builder.icmp_signed("==", byte, _constant(wanted.index(True) - 128))
            for cell in [cell for cell in range(256) if wanted[cell]][1:]:
                open_ = builder.or_(open_, builder.icmp_signed("==", byte, _constant(cell - 128)))
            builder.store(sample, builder.inttoptr(args[1], _BYTES.as_pointer()), align=1)
            return builder.bitcast(open_, _I64)

        return types.int64(types.int64, types.int64), generate

    return samples_of


@intrinsic
def lowest_bit(typing_context, mask):  # type: ignore[no-untyped-def]
    """Return the place of the lowest bit that is set; `mask` is not 0."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.IntType(1)(1))

    return types.int64(types.int64), generate


def _constant(value: int) -> Any:
    return ir.Constant(_BYTES, [value] * LANES)
