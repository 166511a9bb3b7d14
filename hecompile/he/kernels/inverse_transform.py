"""The other way: products with the secret at the n points, and the inverse transform, as `kernels.py` describes them."""

# mypy: disallow-untyped-defs = False
from __future__ import annotations

from hecompile.he.kernels.simd import fma, fnma
from hecompile.he.kernels.transform import FOLD, inlined
from hecompile.he.kernels.vectors import broadcast, load_real, prefetch, store_real


@inlined
def _times_conjugate(re, im, w_re, w_im):
    """(re + i·im)(w_re - i·w_im)."""
    return fma(im, w_im, re * w_re), fnma(re, w_im, im * w_re)


@inlined
def _join4(roots, r, u0r, u0i, u1r, u1i, u2r, u2i, u3r, u3i):
    """The inverse of `_split4`, times 4: the four quarters."""
    ar, ai, br, bi = u0r + u1r, u0i + u1i, u0r - u1r, u0i - u1i
    cr, ci, dr, di = u2r + u3r, u2i + u3i, u2r - u3r, u2i - u3i
    q1r, q1i = _times_conjugate(br + di, bi - dr, broadcast(roots, r), broadcast(roots, r + 1))
    q2r, q2i = _times_conjugate(ar - cr, ai - ci, broadcast(roots, r + 2), broadcast(roots, r + 3))
    q3r, q3i = _times_conjugate(br - di, bi + dr, broadcast(roots, r + 4), broadcast(roots, r + 5))
    return ar + cr, ai + ci, q1r, q1i, q2r, q2i, q3r, q3i


@inlined
def inner(matrix, a, rank_step, secret, s, secret_step, rank):
    """Σ_k matrix[k] · secret[k] at one of the n points, eight rows of the matrix at a time."""
    sr, si = broadcast(secret, s), broadcast(secret, s + 1)
    mr, mi = load_real(matrix, a), load_real(matrix, a + 8)
    re, im = fnma(mi, si, mr * sr), fma(mi, sr, mr * si)
    for k in range(1, rank):
        sr, si = broadcast(secret, s + k * secret_step), broadcast(secret, s + k * secret_step + 1)
        mr, mi = load_real(matrix, a + k * rank_step), load_real(matrix, a + k * rank_step + 8)
        re, im = fnma(mi, si, fma(mr, sr, re)), fma(mi, sr, fma(mr, si, im))
    return re, im


@inlined
def inner_product(matrix, at, secret, s, secret_step, rank, n, wanted, roots, root_count, work, ahead, lines):
    """The product with the secret and all passes of the inverse transform but the last: `work` gets `[n, 2, 8]`.

    Of each quarter that the last pass joins it gets the first `wanted` points, at least.

    Σ_k matrix[at + 16·n·k] · secret[s + k·secret_step], each of these n points, the second's step in numbers.
    The first pass waits for memory and the others do not: while they compute, `lines` cache lines per four points are asked
    for from the address `ahead` on. Returns the size of the quarters that the last pass joins, n/4, and the address after
    the last line asked for.
    """
    rank_step = 16 * n
    r = root_count
    h, nodes = 1, n
    if n & 0x55555555 == 0:  # log2 n is odd: the lowest level is radix 2
        r -= n
        for node in range(n // 2):
            ur, ui = inner(matrix, at + 32 * node, rank_step, secret, s + 4 * node, secret_step, rank)
            vr, vi = inner(matrix, at + 32 * node + 16, rank_step, secret, s + 4 * node + 2, secret_step, rank)
            w = r + 2 * node
            hr, hi = _times_conjugate(ur - vr, ui - vi, broadcast(roots, w), broadcast(roots, w + 1))
            store_real(work, 32 * node, ur + vr)
            store_real(work, 32 * node + 8, ui + vi)
            store_real(work, 32 * node + 16, hr)
            store_real(work, 32 * node + 24, hi)
        h, nodes = 2, n // 2
    else:
        nodes = n // 4
        r -= 6 * nodes
        for node in range(nodes):
            a, b = at + 64 * node, s + 8 * node
            u0r, u0i = inner(matrix, a, rank_step, secret, b, secret_step, rank)
            u1r, u1i = inner(matrix, a + 16, rank_step, secret, b + 2, secret_step, rank)
            u2r, u2i = inner(matrix, a + 32, rank_step, secret, b + 4, secret_step, rank)
            u3r, u3i = inner(matrix, a + 48, rank_step, secret, b + 6, secret_step, rank)
            _store4(work, 64 * node, 16, *_join4(roots, r + 6 * node, u0r, u0i, u1r, u1i, u2r, u2i, u3r, u3i))
        h = 4
    while 4 * h < n:
        nodes //= 4
        r -= 6 * nodes
        step = 16 * h
        for node in range(nodes):
            for p in range(min(h, wanted)):
                a = 64 * h * node + 16 * p
                _store4(work, a, step, *load_and_join4(work, a, step, roots, r + 6 * node))
                ahead = prefetch_lines(ahead, lines)
        h *= 4
    return h, ahead


@inlined
def prefetch_lines(start, lines):
    """Asks for that many cache lines; returns the address after them."""
    for _ in range(lines):
        prefetch(start, 0)
        start += 64
    return start


@inlined
def _store4(work, a, step, q0r, q0i, q1r, q1i, q2r, q2i, q3r, q3i):
    store_real(work, a, q0r)
    store_real(work, a + 8, q0i)
    store_real(work, a + step, q1r)
    store_real(work, a + step + 8, q1i)
    store_real(work, a + 2 * step, q2r)
    store_real(work, a + 2 * step + 8, q2i)
    store_real(work, a + 3 * step, q3r)
    store_real(work, a + 3 * step + 8, q3i)


@inlined
def load_and_join4(work, a, step, roots, r):
    return _join4(
        roots, r,
        load_real(work, a), load_real(work, a + 8),
        load_real(work, a + step), load_real(work, a + step + 8),
        load_real(work, a + 2 * step), load_real(work, a + 2 * step + 8),
        load_real(work, a + 3 * step), load_real(work, a + 3 * step + 8),
    )  # fmt: skip


@inlined
def last_join4(work, a, step, roots):
    """The last pass, and unfolding: four coefficients of the lower half, and their four of the upper, `step`/16 apart."""
    r0, i0, r1, i1, r2, i2, r3, i3 = load_and_join4(work, a, step, roots, FOLD)
    scale, shift = broadcast(roots, 2), broadcast(roots, 3)
    return (
        fnma(i0, shift, r0), i0 * scale, fnma(i1, shift, r1), i1 * scale,
        fnma(i2, shift, r2), i2 * scale, fnma(i3, shift, r3), i3 * scale,
    )  # fmt: skip
