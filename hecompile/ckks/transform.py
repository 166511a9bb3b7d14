"""Compute the number-theoretic transform modulo X^N + 1 in SEAL's order, and its tables.

Values at the odd powers of ψ, the least primitive 2N-th root of unity mod p, in bit-reversed order (Longa, Naehrig,
"Speeding up the number theoretic transform", CANS 2016); a product by a root takes Shoup's precomputed quotient (Harvey,
"Faster arithmetic for number-theoretic transforms", 2014). p < 2^31, so a word is 32 bits and a product 64.
"""

# mypy: disallow-untyped-defs = False
from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from hecompile.he.kernels.jit import compiled

inlined = numba.njit(nogil=True, inline="always", boundscheck=False, error_model="numpy")


class Tables(NamedTuple):
    """Hold the constants of a chain of m moduli for the kernels, uint64."""

    moduli: NDArray[np.uint64]
    """`[m]`."""
    roots: NDArray[np.uint64]
    """`[m, 4, N]`: powers of the root, their quotients, inverse powers, their quotients."""
    inverses: NDArray[np.uint64]
    """`[m, m]`: at [j, i] the inverse of modulus j modulo modulus i."""
    ring_inverse: NDArray[np.uint64]
    """`[m, 2]`: N^-1 and its quotient."""


@lru_cache(maxsize=4)
def tables(ring_dim: int, moduli: tuple[int, ...]) -> Tables:
    """Compute the tables of a chain of NTT-friendly primes."""
    bits = ring_dim.bit_length() - 1
    reverse = np.array([int(format(i, f"0{bits}b")[::-1], 2) for i in range(ring_dim)])
    roots = np.zeros((len(moduli), 4, ring_dim), dtype=np.uint64)
    for index, prime in enumerate(moduli):
        root = _least_root(2 * ring_dim, prime)
        for row, base in ((0, root), (2, pow(root, -1, prime))):
            powers = np.empty(ring_dim, dtype=object)
            value = 1
            for i in range(ring_dim):
                powers[i] = value
                value = value * base % prime
            ordered = powers[reverse]
            roots[index, row] = ordered.astype(np.uint64)
            roots[index, row + 1] = ((ordered << 32) // prime).astype(np.uint64)
    inverses = np.array([[0 if p == q else pow(q, -1, p) for p in moduli] for q in moduli], dtype=np.uint64)
    ring_inverse = np.array([[v := pow(ring_dim, -1, p), (v << 32) // p] for p in moduli], dtype=np.uint64)
    return Tables(np.array(moduli, dtype=np.uint64), roots, inverses, ring_inverse)


def _least_root(order: int, prime: int) -> int:
    """Return the least primitive root of unity of that order, a power of two, modulo the prime."""
    for candidate in range(2, prime):
        root = pow(candidate, (prime - 1) // order, prime)
        if pow(root, order // 2, prime) == prime - 1:
            break
    square, least, value = root * root % prime, root, root
    for _ in range(order // 2):
        value = value * square % prime
        least = min(least, value)
    return least


@compiled
def forward(x, roots, p):
    """Transform x, uint64 `[N]`, reduced, in place."""
    n = x.size
    t, m = n, 1
    while m < n:
        t >>= 1
        for i in range(m):
            w, q = roots[0, m + i], roots[1, m + i]
            a = x[2 * i * t : 2 * i * t + t]
            b = x[2 * i * t + t : 2 * i * t + 2 * t]
            for j in range(t):
                v = b[j]
                v = (v * w) - ((v * q) >> np.uint64(32)) * p
                v = min(v, v - p)
                u = a[j]
                s = u + v
                d = u + p - v
                a[j] = min(s, s - p)
                b[j] = min(d, d - p)
        m <<= 1


@compiled
def backward(x, roots, inverse, p):
    """Invert `forward` in place; `inverse` is N^-1 and its quotient."""
    n = x.size
    t, m = 1, n >> 1
    while m >= 1:
        for i in range(m):
            w, q = roots[2, m + i], roots[3, m + i]
            a = x[2 * i * t : 2 * i * t + t]
            b = x[2 * i * t + t : 2 * i * t + 2 * t]
            for j in range(t):
                u, v = a[j], b[j]
                s = u + v
                a[j] = min(s, s - p)
                d = u + p - v
                d = (d * w) - ((d * q) >> np.uint64(32)) * p
                b[j] = min(d, d - p)
        t <<= 1
        m >>= 1
    for j in range(n):
        v = x[j]
        v = (v * inverse[0]) - ((v * inverse[1]) >> np.uint64(32)) * p
        x[j] = min(v, v - p)
