"""Compute on the words of ciphertexts: sums of products, relinearisation, rescaling, products by constants.

A ciphertext is uint32 `[2, k, N]`, in transformed (NTT) form modulo q_0 … q_{k-1}. Relinearisation is SEAL's hybrid key
switching with one special prime P, digits modulo each q_j (Chen, Han, 2018; native/src/seal/evaluator.cpp,
switch_key_inplace). Rescaling is its division with rounding by the last prime. Results equal SEAL's bit for bit. Every
kernel releases the GIL and writes its own elements alone, those from `start` to `stop`, so that threads share the work.
"""

# mypy: disallow-untyped-defs = False
from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hecompile.ckks.transform import backward, forward, inlined
from hecompile.he.kernels.jit import compiled

_LAZY = 8  # products below 2^60 are summed so often before a reduction


@inlined
def _reduce(x, p, inverse):
    """Return x mod p for x < 2^63, given `inverse` = 1/p as float64: the quotient is off by one at most."""
    r = x - np.uint64(np.float64(x) * inverse) * p
    r = min(r, r + p)
    return min(r, r - p)


class Terms(NamedTuple):
    """Refer to ciphertexts in a store."""

    words: NDArray[np.uint32]
    """`[elements, 2, k, N]`."""
    elements: NDArray[np.int64]
    """Numbers of elements; -1 for zero."""


@compiled
def divide(poly, last, k, dropped, target, tables, scratch):
    """Set target[i] = (poly[i] - [poly mod q_dropped]) / q_dropped, rounded, for i < k; `last` is overwritten.

    Everything is transformed. `tables` is a `Tables`.
    """
    n = last.size
    moduli, roots, inverses = tables.moduli, tables.roots, tables.inverses
    q = moduli[dropped]
    half = q >> np.uint64(1)
    backward(last, roots[dropped], tables.ring_inverse[dropped], q)
    for j in range(n):
        v = last[j] + half
        last[j] = min(v, v - q)
    for i in range(k):
        p = moduli[i]
        offset = p - half % p
        reciprocal = 1.0 / np.float64(p)
        for j in range(n):
            scratch[j] = _reduce(last[j] + offset, p, reciprocal)
        forward(scratch, roots[i], p)
        inverse = inverses[dropped, i]
        for j in range(n):
            target[i, j] = _reduce((np.uint64(poly[i, j]) + p - scratch[j]) * inverse, p, reciprocal)


@compiled
def product_sums(a, b, keys, tables, out, start, stop):
    """Set out[e] to the rescaled, relinearised Σ_t a[e, t] · b[e, t], for start ≤ e < stop.

    a, b: `Terms` with elements [.., terms]; keys: uint32 [digits, 2, m, N], m - 1 the special prime; tables: `Tables`; out:
    uint32 [.., 2, k - 1, N].
    """
    k, n = out.shape[2] + 1, out.shape[3]
    left_words, left_index, right_words, right_index = a.words, a.elements, b.words, b.elements
    moduli, roots = tables.moduli, tables.roots
    special = moduli.size - 1
    acc = np.zeros((3, k, n), dtype=np.uint64)
    switched = np.zeros((2, k + 1, n), dtype=np.uint64)
    digits = np.zeros((k, n), dtype=np.uint64)
    digit = np.zeros(n, dtype=np.uint64)
    scratch = np.zeros(n, dtype=np.uint64)
    for e in range(start, stop):
        for i in range(k):
            p = moduli[i]
            reciprocal = 1.0 / np.float64(p)
            d0, d1, d2 = acc[0, i], acc[1, i], acc[2, i]
            d0[:] = 0
            d1[:] = 0
            d2[:] = 0
            pending = 0
            for t in range(left_index.shape[1]):
                left, right = left_index[e, t], right_index[e, t]
                if left < 0 or right < 0:
                    continue
                a0, a1 = left_words[left, 0, i], left_words[left, 1, i]
                b0, b1 = right_words[right, 0, i], right_words[right, 1, i]
                for j in range(n):
                    x0, x1, y0, y1 = np.uint64(a0[j]), np.uint64(a1[j]), np.uint64(b0[j]), np.uint64(b1[j])
                    d0[j] += x0 * y0
                    d1[j] += x0 * y1 + x1 * y0
                    d2[j] += x1 * y1
                pending += 2
                if pending >= _LAZY - 2:
                    for j in range(n):
                        d0[j] = _reduce(d0[j], p, reciprocal)
                        d1[j] = _reduce(d1[j], p, reciprocal)
                        d2[j] = _reduce(d2[j], p, reciprocal)
                    pending = 1
            for j in range(n):
                d0[j] = _reduce(d0[j], p, reciprocal)
                d1[j] = _reduce(d1[j], p, reciprocal)
                d2[j] = _reduce(d2[j], p, reciprocal)
        for i in range(k):
            digits[i] = acc[2, i]
            backward(digits[i], roots[i], tables.ring_inverse[i], moduli[i])
        for i in range(k + 1):
            m = i if i < k else special
            p = moduli[m]
            reciprocal = 1.0 / np.float64(p)
            s0, s1 = switched[0, i], switched[1, i]
            s0[:] = 0
            s1[:] = 0
            for d in range(k):
                if d == i:
                    digit[:] = acc[2, i]
                else:
                    source = digits[d]
                    for j in range(n):
                        digit[j] = _reduce(source[j], p, reciprocal)
                    forward(digit, roots[m], p)
                k0, k1 = keys[d, 0, m], keys[d, 1, m]
                for j in range(n):
                    s0[j] += digit[j] * np.uint64(k0[j])
                    s1[j] += digit[j] * np.uint64(k1[j])
                if d % 3 == 2 or d == k - 1:
                    for j in range(n):
                        s0[j] = _reduce(s0[j], p, reciprocal)
                        s1[j] = _reduce(s1[j], p, reciprocal)
        for c in range(2):
            divide(switched[c], switched[c, k], k, special, switched[c], tables, scratch)
            for i in range(k):
                p = moduli[i]
                for j in range(n):
                    v = acc[c, i, j] + switched[c, i, j]
                    acc[c, i, j] = min(v, v - p)
            divide(acc[c], acc[c, k - 1], k - 1, k - 1, out[e, c], tables, scratch)


@compiled
def rescale(words, tables, out, start, stop):
    """Set out[e] to words[e] divided by its last prime, rounded: uint32 `[.., 2, k, N]` → `[.., 2, k - 1, N]`."""
    k, n = words.shape[2], words.shape[3]
    last = np.zeros(n, dtype=np.uint64)
    scratch = np.zeros(n, dtype=np.uint64)
    for e in range(start, stop):
        for c in range(2):
            for j in range(n):
                last[j] = words[e, c, k - 1, j]
            divide(words[e, c], last, k - 1, k - 1, out[e, c], tables, scratch)


@compiled
def scale(words, index, factors, moduli, out, start, stop):
    """Set out[e] = words[index[e]] · factors[e] mod q.

    factors: residues, uint64 `[.., k]`. The first k primes of the words are read.
    """
    for e in range(start, stop):
        for c in range(2):
            for i in range(out.shape[2]):
                p, f = moduli[i], factors[e, i]
                reciprocal = 1.0 / np.float64(p)
                source, target = words[index[e], c, i], out[e, c, i]
                for j in range(source.size):
                    target[j] = _reduce(np.uint64(source[j]) * f, p, reciprocal)


@compiled
def sums(words, index, moduli, out, start, stop):
    """Set out[e] = Σ_t words[index[e, t]], without terms of index -1, for the primes of `out`, the first of the words."""
    total = np.zeros(out.shape[3], dtype=np.uint64)
    for e in range(start, stop):
        for c in range(2):
            for i in range(out.shape[2]):
                p = moduli[i]
                reciprocal = 1.0 / np.float64(p)
                total[:] = 0
                for t in range(index.shape[1]):
                    if index[e, t] >= 0:
                        source = words[index[e, t], c, i]
                        for j in range(total.size):
                            total[j] += np.uint64(source[j])
                target = out[e, c, i]
                for j in range(total.size):
                    target[j] = _reduce(total[j], p, reciprocal)


@compiled
def add(a, b, sign, moduli, out, start, stop):
    """Set out[e] = a[e] + sign · b[e] for `Terms` a and b with elements [..], sign 1 or -1."""
    left_words, left_index, right_words, right_index = a.words, a.elements, b.words, b.elements
    for e in range(start, stop):
        left, right = left_index[e], right_index[e]
        for c in range(2):
            for i in range(out.shape[2]):
                p = moduli[i]
                target = out[e, c, i]
                if left >= 0:
                    target[:] = left_words[left, c, i]
                else:
                    target[:] = 0
                if right < 0:
                    continue
                source = right_words[right, c, i]
                if sign > 0:
                    for j in range(target.size):
                        v = np.uint64(target[j]) + np.uint64(source[j])
                        target[j] = min(v, v - p)
                else:
                    for j in range(target.size):
                        v = np.uint64(target[j]) + p - np.uint64(source[j])
                        target[j] = min(v, v - p)


@compiled
def add_constants(words, residues, moduli, start, stop):
    """Add residues[e], uint64 `[.., k]`, to words[e] in every slot."""
    for e in range(start, stop):
        for i in range(words.shape[2]):
            p, r = moduli[i], residues[e, i]
            target = words[e, 0, i]
            for j in range(target.size):
                v = np.uint64(target[j]) + r
                target[j] = min(v, v - p)


@compiled
def gather(words, index, prime, out, start, stop):
    """Set out[f] to the two polynomials of words[index[f]] modulo one prime, as float64 `[2N]`."""
    n = words.shape[3]
    for f in range(start, stop):
        if index[f] < 0:
            out[f] = 0.0
            continue
        for c in range(2):
            source = words[index[f], c, prime]
            for j in range(n):
                out[f, c * n + j] = source[j]


@compiled
def recombine(high, low, shift, p, prime, out, start, stop):
    """Set out[f, :, prime] = high[f] · shift + low[f] mod p, both exact integers in float64 [2N]."""
    n = out.shape[3]
    reciprocal = 1.0 / np.float64(p)
    modulus = np.float64(p)
    for f in range(start, stop):
        for c in range(2):
            target = out[f, c, prime]
            for j in range(n):
                upper, lower = high[f, c * n + j], low[f, c * n + j]
                upper -= np.floor(upper * reciprocal) * modulus  # exact: the quotient is below 2^23
                lower -= np.floor(lower * reciprocal) * modulus
                value = np.int64(upper * shift + lower) + np.int64(2 * shift) * np.int64(p)
                target[j] = _reduce(np.uint64(value), p, reciprocal)
