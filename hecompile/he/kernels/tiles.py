"""Work on tiles: the words of some groups of eight features and all tokens at a time, int32 `[groups, tokens, 8]`.

A tile holds masks ⟨A_j, s⟩ or ⟨H_i, s⟩. Real values, wire bytes and the sums of verification meet them in registers.
Decrypting has 64 features in a tile, encrypting up to eight times as many.

Real matrices and wire bytes lie token by token, polynomials feature by feature. A tile is where the two meet: small enough
for the second-level cache, wide enough that the rows of a token are read and written in whole cache lines. (Going from one
group to the rows directly touches one short piece per token at a stride of a power of two, and was four times slower.)

The distance between the groups of a tile, `stride` words, is a little more than 8 · tokens, so that the groups do not
compete for the same cache sets.
"""

# mypy: disallow-untyped-defs = False
from __future__ import annotations

import numpy as np

from hecompile.he.kernels.arguments import Strided
from hecompile.he.kernels.inverse_transform import mask_block
from hecompile.he.kernels.jit import inlined
from hecompile.he.kernels.lines import GROUPS, SUM_LANES
from hecompile.he.kernels.scratch import second_level_cache
from hecompile.he.kernels.vectors import LANES, prefetch

WIDTH = LANES * GROUPS
"""Features of a line: 64, whose bytes of one plane are one cache line. A tile has whole lines of every token."""

PADDING = 16
"""Words between the groups of a tile: one cache line."""

AHEAD = 16
"""Tokens that memory is prefetched ahead of its use: rows lie on pages of their own, which no processor foresees."""

LINES = 8
"""Most lines of a token in a tile. The more, the fewer pages the rows lie on."""


def tile_words(tokens: int) -> int:
    """Return the exact number of int32 that `encrypt` and `decrypt` want as scratch for a tile."""
    half_of_cache = second_level_cache() // 8  # in words
    lines = max(1, min(LINES, half_of_cache // (WIDTH * max(1, tokens))))
    return lines * GROUPS * (LANES * tokens + PADDING)


@inlined
def mask_group(ring, matrix, secrets, tokens, to, work, ahead):
    """Write ⟨matrix row, secret⟩ mod 2^32 for one group and all blocks of tokens: int32 `[tokens, 8]` at the address `to`.

    `matrix` is a `Strided`, `secrets` a `Secrets`. Meanwhile `ahead`, what the next group is made of, is prefetched.
    """
    n = ring.n
    lines, start = _lines_per_step(ahead.size, tokens, n), ahead.start
    for token in range(0, tokens, 2 * n):
        secret = Strided(secrets.start, token * secrets.per_block + 2 * n * secrets.first, 2 * n * secrets.step)
        count = min(2 * n, tokens - token)
        start = mask_block(ring, matrix, secret, count, to + 32 * token, work, start, lines)


@inlined
def _lines_per_step(size, tokens, n):
    """Return how many cache lines passes after the first prefetch per four points, to reach `size` bytes at the end."""
    steps, quarter = 0, n // 4
    while quarter > 1:
        of_quarters = min(quarter, tokens % (2 * n)) + tokens // (2 * n) * quarter
        steps += n // (4 * quarter) * of_quarters
        quarter //= 4
    return (size + 64 * steps - 1) // (64 * steps)


@inlined
def prefetch_drawn(start, size, drawn):
    """Prefetch the check vectors of the drawn variants, `size` bytes each: which of them the next token wants is random."""
    for variant in drawn:
        for k in range(0, size, 64):
            prefetch(start + size * variant, k)


@inlined
def join_lanes(sums, dropped):
    """Put the total of the lanes of each sum, int32 `[n, m, SUM_LANES]`, into its first lane, times 2^dropped."""
    for i in range(sums.shape[0]):
        for k in range(sums.shape[1]):
            total = np.int64(0)
            for lane in range(SUM_LANES):
                total += sums[i, k, lane]
            sums[i, k, 0] = total << dropped
