"""Split and join nodes of the transform's tree four ways, in registers: see `transform.py`."""

# mypy: disallow-untyped-defs = False
from __future__ import annotations

from typing import Any, NamedTuple

from hecompile.he.kernels.jit import inlined
from hecompile.he.kernels.simd import fma, fnma
from hecompile.he.kernels.vectors import broadcast, load_real, store_real


class Quarters(NamedTuple):
    """Hold one complex point of each quarter of a node, for eight features: real and imaginary parts."""

    r0: Any
    i0: Any
    r1: Any
    i1: Any
    r2: Any
    i2: Any
    r3: Any
    i3: Any


@inlined
def times(re, im, w_re, w_im):
    """Return (re + i·im)(w_re + i·w_im)."""
    return fnma(im, w_im, re * w_re), fma(im, w_re, re * w_im)


@inlined
def times_conjugate(re, im, w_re, w_im):
    """Return (re + i·im)(w_re - i·w_im)."""
    return fma(im, w_im, re * w_re), fnma(re, w_im, im * w_re)


@inlined
def split4(roots, r, q):
    """Return the points of the four grandchildren of a node of size 4h, whose roots begin at number `r`."""
    q1r, q1i = times(q.r1, q.i1, broadcast(roots, r), broadcast(roots, r + 1))
    q2r, q2i = times(q.r2, q.i2, broadcast(roots, r + 2), broadcast(roots, r + 3))
    q3r, q3i = times(q.r3, q.i3, broadcast(roots, r + 4), broadcast(roots, r + 5))
    ar, ai, br, bi = q.r0 + q2r, q.i0 + q2i, q1r + q3r, q1i + q3i
    cr, ci, dr, di = q.r0 - q2r, q.i0 - q2i, q1r - q3r, q1i - q3i
    return Quarters(ar + br, ai + bi, ar - br, ai - bi, cr - di, ci + dr, cr + di, ci - dr)


@inlined
def join4(roots, r, u):
    """Invert `split4`, times 4."""
    ar, ai, br, bi = u.r0 + u.r1, u.i0 + u.i1, u.r0 - u.r1, u.i0 - u.i1
    cr, ci, dr, di = u.r2 + u.r3, u.i2 + u.i3, u.r2 - u.r3, u.i2 - u.i3
    q1r, q1i = times_conjugate(br + di, bi - dr, broadcast(roots, r), broadcast(roots, r + 1))
    q2r, q2i = times_conjugate(ar - cr, ai - ci, broadcast(roots, r + 2), broadcast(roots, r + 3))
    q3r, q3i = times_conjugate(br - di, bi + dr, broadcast(roots, r + 4), broadcast(roots, r + 5))
    return Quarters(ar + cr, ai + ci, q1r, q1i, q2r, q2i, q3r, q3i)


@inlined
def load4(place):
    """Load the four points at `place`, a `Strided`."""
    start, at, step = place
    return Quarters(
        load_real(start, at), load_real(start, at + 8),
        load_real(start, at + step), load_real(start, at + step + 8),
        load_real(start, at + 2 * step), load_real(start, at + 2 * step + 8),
        load_real(start, at + 3 * step), load_real(start, at + 3 * step + 8),
    )  # fmt: skip


@inlined
def store4(place, q):
    """Store four points at `place`, a `Strided`."""
    start, at, step = place
    store_real(start, at, q.r0)
    store_real(start, at + 8, q.i0)
    store_real(start, at + step, q.r1)
    store_real(start, at + step + 8, q.i1)
    store_real(start, at + 2 * step, q.r2)
    store_real(start, at + 2 * step + 8, q.i2)
    store_real(start, at + 3 * step, q.r3)
    store_real(start, at + 3 * step + 8, q.i3)
