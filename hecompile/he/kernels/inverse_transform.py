"""Compute masks: multiply with the secret at the n points and transform back, as `transform.py` describes."""

# mypy: disallow-untyped-defs = False
from __future__ import annotations

from hecompile.he.kernels.arguments import Strided
from hecompile.he.kernels.jit import inlined
from hecompile.he.kernels.radix4 import Quarters, join4, load4, store4, times_conjugate
from hecompile.he.kernels.simd import fma, fnma, round_mod_2_32
from hecompile.he.kernels.transform import FOLD
from hecompile.he.kernels.vectors import broadcast, load_real, prefetch, store_i32, store_real


@inlined
def mask_block(ring, matrix, secret, count, to, work, ahead, lines):
    """Write ⟨row, secret⟩ mod 2^32 for eight rows of a matrix and one block: int32 `[count, 8]` at the address `to`.

    Args:
        ring: `Ring`, whose `roots` is an address.
        matrix: `Strided`, the transformed polynomials of the rows, `[n, 2, 8]` each.
        secret: `Strided`, the transformed polynomials of the secret, `[n, 2]` each, divided by n.
        count: how many coefficients are wanted, at most 2n.
        to: address.
        work: address of 16·n numbers of scratch.
        ahead: address from which memory is prefetched during all passes but the first, which waits for memory itself.
        lines: cache lines to prefetch per four points.

    Returns:
        The address after the last line that was prefetched.
    """
    n = ring.n
    h, ahead = _product_and_passes(ring, matrix, secret, count, work, ahead, lines)
    for p in range(min(h, count)):
        q = _last_join4(Strided(work, 16 * p, 16 * h), ring.roots)
        _store_mask(q.r0, to, p, count)
        _store_mask(q.r1, to, p + h, count)
        _store_mask(q.r2, to, p + 2 * h, count)
        _store_mask(q.r3, to, p + 3 * h, count)
        _store_mask(q.i0, to, p + n, count)
        _store_mask(q.i1, to, p + n + h, count)
        _store_mask(q.i2, to, p + n + 2 * h, count)
        _store_mask(q.i3, to, p + n + 3 * h, count)
        ahead = _prefetch_lines(ahead, lines)
    return ahead


@inlined
def _store_mask(mask, to, place, count):
    if place < count:
        store_i32(to, 8 * place, round_mod_2_32(mask))


@inlined
def _product_and_passes(ring, matrix, secret, wanted, work, ahead, lines):
    """Multiply, and run all passes of the inverse transform but the last: `work` gets `[n, 2, 8]`.

    The last pass joins four quarters; at least the first `wanted` points of each quarter are computed.
    Returns the size of a quarter, n/4, and the address after the last line that was prefetched.
    """
    n, roots = ring.n, ring.roots
    r = ring.root_count
    h, nodes = 1, n
    if n & 0x55555555 == 0:  # log2 n is odd: the lowest level is radix 2
        r -= n
        for node in range(n // 2):
            ur, ui = _product(matrix, secret, 2 * node, ring.rank)
            vr, vi = _product(matrix, secret, 2 * node + 1, ring.rank)
            w = r + 2 * node
            hr, hi = times_conjugate(ur - vr, ui - vi, broadcast(roots, w), broadcast(roots, w + 1))
            store_real(work, 32 * node, ur + vr)
            store_real(work, 32 * node + 8, ui + vi)
            store_real(work, 32 * node + 16, hr)
            store_real(work, 32 * node + 24, hi)
        h, nodes = 2, n // 2
    else:
        nodes = n // 4
        r -= 6 * nodes
        for node in range(nodes):
            u0r, u0i = _product(matrix, secret, 4 * node, ring.rank)
            u1r, u1i = _product(matrix, secret, 4 * node + 1, ring.rank)
            u2r, u2i = _product(matrix, secret, 4 * node + 2, ring.rank)
            u3r, u3i = _product(matrix, secret, 4 * node + 3, ring.rank)
            quarters = Quarters(u0r, u0i, u1r, u1i, u2r, u2i, u3r, u3i)
            store4(Strided(work, 64 * node, 16), join4(roots, r + 6 * node, quarters))
        h = 4
    while 4 * h < n:
        nodes //= 4
        r -= 6 * nodes
        step = 16 * h
        for node in range(nodes):
            for p in range(min(h, wanted)):
                place = Strided(work, 64 * h * node + 16 * p, step)
                store4(place, join4(roots, r + 6 * node, load4(place)))
                ahead = _prefetch_lines(ahead, lines)
        h *= 4
    return h, ahead


@inlined
def _product(matrix, secret, point, rank):
    """Return Σ_k matrix[k] · secret[k] at one of the n points, for eight rows of the matrix."""
    a, s = matrix.at + 16 * point, secret.at + 2 * point
    sr, si = broadcast(secret.start, s), broadcast(secret.start, s + 1)
    mr, mi = load_real(matrix.start, a), load_real(matrix.start, a + 8)
    re, im = fnma(mi, si, mr * sr), fma(mi, sr, mr * si)
    for k in range(1, rank):
        at_k = s + k * secret.step
        sr, si = broadcast(secret.start, at_k), broadcast(secret.start, at_k + 1)
        mr, mi = load_real(matrix.start, a + k * matrix.step), load_real(matrix.start, a + k * matrix.step + 8)
        re, im = fnma(mi, si, fma(mr, sr, re)), fma(mi, sr, fma(mr, si, im))
    return re, im


@inlined
def _prefetch_lines(start, lines):
    """Prefetch that many cache lines and return the address after them."""
    for _ in range(lines):
        prefetch(start, 0)
        start += 64
    return start


@inlined
def _last_join4(place, roots):
    """Run the last pass and unfold: r0 … r3 become coefficients of the lower half, i0 … i3 theirs of the upper."""
    q = join4(roots, FOLD, load4(place))
    scale, shift = broadcast(roots, 2), broadcast(roots, 3)
    return Quarters(
        fnma(q.i0, shift, q.r0), q.i0 * scale, fnma(q.i1, shift, q.r1), q.i1 * scale,
        fnma(q.i2, shift, q.r2), q.i2 * scale, fnma(q.i3, shift, q.r3), q.i3 * scale,
    )  # fmt: skip
