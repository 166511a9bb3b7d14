"""The client's hot loops over a tile: groups of eight features, all tokens, as int32 words `[groups, tokens, 8]`.

Decrypting has 64 features in a tile, encrypting up to eight times as many.

A tile holds masks ⟨A_j, s⟩ or ⟨H_i, s⟩; real values, wire bytes and the sums of verification meet them in registers. Real
matrices and wire bytes lie token by token, polynomials feature by feature. A tile is where the two meet: small enough for
the second-level cache, wide enough that the rows of a token are read and written in whole cache lines. (Going from one
group to the rows directly touches one short piece per token at a stride of a power of two, and was four times slower.)

`stride` is the distance between groups of a tile, in words; a little more than 8·tokens, so that the groups do not compete
for the same cache sets.
"""

# mypy: disallow-untyped-defs = False
from __future__ import annotations

import numpy as np

from hecompile.he.kernels.inverse_transform import inner_product, last_join4, prefetch_lines
from hecompile.he.kernels.jit import compiled
from hecompile.he.kernels.line_bytes import pack, pack_past_caches, unpack
from hecompile.he.kernels.lines import (
    GROUPS,
    LINE_BYTES,
    SUM_LANES,
    add_dot,
    group_of,
    line_of,
    line_shifted_up,
    load_line,
    stores_done,
    top_of_line,
)
from hecompile.he.kernels.scratch import second_level_cache
from hecompile.he.kernels.simd import round_mod_2_32, to_f64
from hecompile.he.kernels.transform import forward_at, inlined
from hecompile.he.kernels.vectors import (
    LANES,
    address,
    broadcast,
    load_f32,
    load_f64,
    load_i8,
    prefetch,
    prefetch_to_write,
    real_address,
    splat,
    store_f32,
    store_i32,
)

WIDTH = LANES * GROUPS
"""Features of a line: 64, whose bytes of one plane are one cache line. A tile has whole lines of every token."""

_PADDING = 16
"""Words between the groups of a tile: one cache line."""

_AHEAD = 16
"""Tokens that memory is asked for ahead of its use: rows lie on pages of their own, which no processor foresees."""

_LINES = 8
"""Most lines of a token in a tile. The more, the fewer pages the rows lie on."""


@inlined
def _store_mask(mask, at, c, count):
    if c < count:
        store_i32(at, 8 * c, round_mod_2_32(mask))


@inlined
def _inner_product(
    matrix, base, rank, n, roots, root_count, secrets, first, step, per_block, tokens, tile, at, work, ahead, size
):  # fmt: skip
    """tile = ⟨matrix row, secret⟩ mod 2^32 for one group and all blocks of tokens.

    secrets: `[blocks, per_block, n, 2]`, of which those from `first` on are taken in steps of `step` of them. Meanwhile the
    `size` bytes from the address `ahead` on, which the next group is made of, are asked for.
    """
    lines = lines_per_step(size, tokens, n)
    for token in range(0, tokens, 2 * n):
        secret = token * per_block + 2 * n * first
        m = min(2 * n, tokens - token)
        h, ahead = inner_product(
            matrix, base, secrets, secret, 2 * n * step, rank, n, m, roots, root_count, work, ahead, lines
        )
        to = tile + 4 * (at + 8 * token)
        for p in range(min(h, m)):
            r0, i0, r1, i1, r2, i2, r3, i3 = last_join4(work, 16 * p, 16 * h, roots)
            _store_mask(r0, to, p, m)
            _store_mask(r1, to, p + h, m)
            _store_mask(r2, to, p + 2 * h, m)
            _store_mask(r3, to, p + 3 * h, m)
            _store_mask(i0, to, p + n, m)
            _store_mask(i1, to, p + n + h, m)
            _store_mask(i2, to, p + n + 2 * h, m)
            _store_mask(i3, to, p + n + 3 * h, m)
            ahead = prefetch_lines(ahead, lines)


@inlined
def lines_per_step(size, tokens, n):
    """Cache lines per four points that passes after the first ask for, to have asked for `size` bytes at the end."""
    steps, quarter = 0, n // 4
    while quarter > 1:
        of_quarters = min(quarter, tokens % (2 * n)) + tokens // (2 * n) * quarter
        steps += n // (4 * quarter) * of_quarters
        quarter //= 4
    return (size + 64 * steps - 1) // (64 * steps)


@inlined
def _plain(x, at, factor, k, scale, error, e):
    """Eight features of a token: x times factor times scale, rounded, plus the error."""
    real = load_f32(x, at + k) * load_f64(factor, k) * scale
    return round_mod_2_32(real) + load_i8(error, e + k)


@inlined
def _real(line, index, scale, factor, result, r):
    real = to_f64(group_of(line, index)) * scale * load_f64(factor, 8 * index)
    store_f32(result, r + 8 * index, real + splat(0.0))


@inlined
def _prefetch_factors(start, rows):
    """What the words of a tile are multiplied with: which row of it the next token wants is drawn at random."""
    for k in range(0, 4 * WIDTH * rows, 64):
        prefetch(start, k)


@compiled
def encrypt(
    matrix, first, features, rank, packing, n, roots, secrets, tokens, x, x_at, x_row, inverse_scale, factors,
    error, planes, p_at, plane, p_row, limbs, past_caches, tile, work, images, checks, variants, sums
):  # fmt: skip
    """Encrypts `tokens` tokens of `features` features, of which the first is in group `first` of the matrix.

    matrix: float64, the transformed rows of A `[groups, rank, n, 2, 8]`, or ring elements that serve `packing` = rank groups
    each, one after the other. secrets: float64 `[blocks, rank, n, 2]`, divided by n, or extended by `extend_secrets`: of an
    element a, group k gets Σ_i a_i times number rank - 1 + k - i of them. x: float32, feature j of token t at
    `x_at + t·x_row + j`; times factors `[features]` and inverse_scale `[tokens]`, float64, it is rounded to an integer.
    error: int8, at `t·features + j`. planes: uint8, byte l of a word at `p_at + l·plane + t·p_row + j`,
    written past the caches if past_caches says so and whole lines of it are cache lines. tile: int32, exactly
    `tile_words(tokens)` of scratch; work: float64, 16·n of scratch.
    For verification, images: int32 `[lines, variants · checks, 64]`, from the first feature on, as `Checks` has them by
    lines; sums `[checks, tokens, SUM_LANES]` int32 grows, all lanes together, by Σ_j top_j times image j of variant
    variants[t], where top_j is what is sent: the word without the bytes that are not.
    """
    stride = 8 * tokens + _PADDING
    lines = tile.size // (GROUPS * stride)
    ahead = max(1, _AHEAD // lines)
    dropped = 8 * (4 - limbs)
    half = (1 << dropped) >> 1
    root_count = roots.size
    x_, scale_, factor_, error_ = address(x), address(inverse_scale), address(factors), address(error)
    matrix_, roots_, secrets_ = address(matrix), address(roots), address(secrets)
    tile_, work_, planes_ = address(tile), address(work), address(planes)
    images_, sums_, image_rows, images_flat = address(images), address(sums), images.shape[1], images.reshape(-1)
    group_size = rank * 16 * n
    per_block, step = (rank, 1) if packing == 1 else (2 * rank - 1, -1)
    ahead_size = 8 * group_size // packing
    aligned = (planes_ + p_at) % LINE_BYTES == 0 and plane % LINE_BYTES == 0 and p_row % LINE_BYTES == 0
    past_caches = past_caches and aligned
    for j in range(0, features, WIDTH * lines):
        columns = min(WIDTH * lines, features - j)
        for g in range((columns + 7) // 8):
            group = first + j // 8 + g
            base, component = group // packing * group_size, group % packing
            _inner_product(
                matrix_, base, rank, n, roots_, root_count, secrets_, 0 if packing == 1 else rank - 1 + component, step,
                per_block, tokens, tile_, g * stride, work_,
                matrix_ + 8 * (base + group_size) + component * ahead_size, ahead_size,
            )  # fmt: skip
        _prefetch_factors(images_ + 4 * j * image_rows, image_rows * (columns // WIDTH))
        for t in range(tokens):
            scale = broadcast(scale_, t)
            for c in range(0, columns, WIDTH):
                width, i, masks = min(WIDTH, columns - c), j + c, 4 * stride * (c // 8)
                row, e, out = x_at + t * x_row + i, t * features + i, p_at + t * p_row + i
                image = i * image_rows + WIDTH * variants[t] * checks
                if width == WIDTH:
                    for k in range(0, 256, 64):
                        prefetch(x_, 4 * (row + ahead * x_row) + k)
                    prefetch(error_, e + ahead * features)
                    if not past_caches:
                        for limb in range(limbs):
                            prefetch_to_write(planes_, out + limb * plane + ahead * p_row)
                    to = factor_ + 8 * i
                    plain = line_of(
                        _plain(x_, row, to, 0, scale, error_, e), _plain(x_, row, to, 8, scale, error_, e),
                        _plain(x_, row, to, 16, scale, error_, e), _plain(x_, row, to, 24, scale, error_, e),
                        _plain(x_, row, to, 32, scale, error_, e), _plain(x_, row, to, 40, scale, error_, e),
                        _plain(x_, row, to, 48, scale, error_, e), _plain(x_, row, to, 56, scale, error_, e),
                    )  # fmt: skip
                    top = top_of_line(plain + load_line(tile_ + masks + 32 * t, 4 * stride), half, dropped)
                    if past_caches:
                        pack_past_caches(limbs, top, planes_ + out, plane)
                    else:
                        pack(limbs, top, planes_ + out, plane)
                    for check in range(checks):
                        sum_at = SUM_LANES * (check * tokens + t)
                        add_dot(top, images_ + 4 * (image + WIDTH * check), sums_ + 4 * sum_at)
                    continue
                for k in range(width):
                    value = np.int64(np.rint(np.float64(x[row + k]) * factors[i + k] * inverse_scale[t]))
                    word = value + error[e + k] + tile[(c + k) // 8 * stride + 8 * t + k % 8] + half
                    word = (word & 0xFFFFFFFF) >> dropped
                    for limb in range(limbs):
                        planes[out + limb * plane + k] = np.uint8((word >> (8 * limb)) & 255)
                    for check in range(checks):
                        factor = images_flat[image + WIDTH * check + k]
                        sums[SUM_LANES * (check * tokens + t)] += word * factor
    stores_done()


@compiled
def decrypt(
    hint, kept, first, features, rank, n, roots, secrets, tokens, planes, p_at, plane, p_row, limbs, scale, factors,
    result, r_at, r_row, tile, values, work, vectors, check_features, variants, sums
):  # fmt: skip
    """Decrypts `tokens` tokens of `features` features, of which the first is in group `first` of the hint.

    hint: int32, rows of H `[groups, rank, 2n, 8]`, and kept: empty, or their transforms, `[groups, rank, n, 2, 8]`, which
    are then used instead. kept, roots, secrets, values and work are all float64 or all float32.
    planes: uint8, byte l of the reply at `p_at + l·plane + t·p_row + j`.
    result: float32 at `r_at + t·r_row + j`: the word times scale `[tokens]` times factors `[features]`, float64.
    values: rank · 16 · n of scratch. The rest is as in `encrypt`.
    For verification, vectors: int32 `[lines, variants, 64]`, as `Checks` has them by lines; sums
    `[checks, tokens, SUM_LANES]` int32 grows, all lanes together, by Σ_j top_j times vector j of variant variants[t], in
    the place of the check that the feature belongs to: `check_features` (a multiple of 64) each. top_j is the word without
    what was not sent.
    """
    stride = 8 * tokens + _PADDING
    dropped = 8 * (4 - limbs)
    root_count = roots.size
    hint_, kept_, roots_, secrets_ = address(hint), real_address(kept), real_address(roots), real_address(secrets)
    keep, planes_, sums_, kept_at = kept.size > 0, address(planes), address(sums), address(kept)
    scale_, factor_, result_, vectors_ = address(scale), address(factors), address(result), address(vectors)
    tile_, values_, work_ = address(tile), real_address(values), real_address(work)
    vector_rows, vectors_flat = vectors.shape[1], vectors.reshape(-1)
    group_size = rank * 16 * n
    for j in range(0, features, WIDTH):
        width = min(WIDTH, features - j)
        for g in range((width + 7) // 8):
            base = (first + j // 8 + g) * group_size
            if keep:
                matrix, start = kept_, base
                ahead, ahead_size = kept_at + kept.itemsize * (base + group_size), kept.itemsize * group_size
            else:
                matrix, start = values_, 0
                ahead, ahead_size = hint_ + 4 * (base + group_size), 4 * group_size
                for i in range(rank):
                    forward_at(hint_, base + i * 16 * n, n, roots_, values_, i * 16 * n)
            _inner_product(
                matrix, start, rank, n, roots_, root_count, secrets_, 0, 1, rank, tokens, tile_, g * stride, work_, ahead,
                ahead_size,
            )
        factors_at, check = j * vector_rows, (8 * first + j) // check_features
        _prefetch_factors(vectors_ + 4 * factors_at, vector_rows)
        for t in range(tokens):
            at, r = p_at + t * p_row + j, r_at + t * r_row + j
            vector = factors_at + WIDTH * variants[t]
            if width == WIDTH:
                for limb in range(limbs):
                    prefetch(planes_, at + limb * plane + _AHEAD * p_row)
                for k in range(0, 256, 64):
                    prefetch_to_write(result_, 4 * (r + _AHEAD * r_row) + k)
                top = unpack(limbs, planes_ + at, plane)
                if vector_rows > 0:
                    add_dot(top, vectors_ + 4 * vector, sums_ + 4 * SUM_LANES * (check * tokens + t))
                line = line_shifted_up(top, dropped) - load_line(tile_ + 32 * t, 4 * stride)
                factor, to = broadcast(scale_, t), factor_ + 8 * j
                _real(line, 0, factor, to, result_, r)
                _real(line, 1, factor, to, result_, r)
                _real(line, 2, factor, to, result_, r)
                _real(line, 3, factor, to, result_, r)
                _real(line, 4, factor, to, result_, r)
                _real(line, 5, factor, to, result_, r)
                _real(line, 6, factor, to, result_, r)
                _real(line, 7, factor, to, result_, r)
                continue
            for k in range(width):
                word = np.int64(0)
                for limb in range(limbs):
                    word |= np.int64(planes[at + limb * plane + k]) << (8 * limb)
                if vector_rows > 0:
                    sums[SUM_LANES * (check * tokens + t)] += word * vectors_flat[vector + k]
                centred = np.int32((word << dropped) - tile[k // 8 * stride + 8 * t + k % 8])
                result[r + k] = np.float64(centred) * scale[t] * factors[j + k] + 0.0


def tile_words(tokens: int) -> int:
    """int32 of scratch that `encrypt` and `decrypt` want for a tile, no more and no fewer."""
    half_of_cache = second_level_cache() // 8  # in words
    lines = max(1, min(_LINES, half_of_cache // (WIDTH * max(1, tokens))))
    return lines * GROUPS * (LANES * tokens + _PADDING)
