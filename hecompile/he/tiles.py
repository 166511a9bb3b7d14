"""The client's hot loops over a tile: a few groups of eight features, all tokens, as int32 words `[groups, tokens, 8]`.

Real matrices and wire bytes lie token by token, polynomials feature by feature. A tile is where the two meet: small enough
for the second-level cache, wide enough that the rows of a token are read and written in whole cache lines. (Going from one
group to the rows directly touches one short piece per token at a stride of a power of two, and was four times slower.)

`stride` is the distance between groups of a tile, in words; a little more than 8·tokens, so that the groups do not compete
for the same cache sets.
"""

# mypy: disallow-untyped-defs = False
from __future__ import annotations

import numpy as np

from hecompile.he.kernels import compiled, forward_at, inlined, inner_product, load_and_join4
from hecompile.he.lines import (
    GROUPS,
    SUM_LANES,
    pack_line,
    prefetch,
    prefetch_to_write,
    unpack_line,
)
from hecompile.he.simd import (
    absolute,
    address,
    broadcast,
    fma,
    load_f32,
    load_f64,
    load_i8,
    load_i32,
    load_u8,
    maximum,
    round_mod_2_32,
    shift_left,
    shift_right,
    splat,
    splat_i32,
    store_f32,
    store_f64,
    store_i32,
    store_u8,
    to_f64,
)

TILE_GROUPS = GROUPS
"""At most this many groups to a tile: 64 features, of which a row of one byte plane is one cache line."""

_TILE_TOKENS = 16384
"""Groups times tokens of a tile, at most (where that leaves two groups): 512 KiB."""

_PADDING = 16
"""Words between the groups of a tile: one cache line."""

_AHEAD = 16
"""Tokens that memory is asked for ahead of its use: rows lie on pages of their own, which no processor foresees."""


@inlined
def tile_groups(tokens):
    return max(2, min(TILE_GROUPS, _TILE_TOKENS // max(1, tokens)))


@inlined
def _add_mask(mask, at, c, count, negative):
    if c < count:
        word = round_mod_2_32(mask)
        old = load_i32(at, 8 * c)
        store_i32(at, 8 * c, old - word if negative else old + word)


@inlined
def _add_inner_product(matrix, base, rank, n, roots, root_count, secrets, tokens, tile, at, work, negative):
    """tile ± ⟨matrix row, secret⟩ mod 2^32 for one group and all blocks of tokens."""
    for token in range(0, tokens, 2 * n):
        h = inner_product(matrix, base, secrets, token * rank, rank, n, roots, root_count, work)
        m = min(2 * n, tokens - token)
        to = tile + 4 * (at + 8 * token)
        for p in range(h):
            r0, i0, r1, i1, r2, i2, r3, i3 = load_and_join4(work, 16 * p, 16 * h, roots, 0)
            _add_mask(r0, to, p, m, negative)
            _add_mask(r1, to, p + h, m, negative)
            _add_mask(r2, to, p + 2 * h, m, negative)
            _add_mask(r3, to, p + 3 * h, m, negative)
            _add_mask(i0, to, p + n, m, negative)
            _add_mask(i1, to, p + n + h, m, negative)
            _add_mask(i2, to, p + n + 2 * h, m, negative)
            _add_mask(i3, to, p + n + 3 * h, m, negative)


@inlined
def _pack(limbs, tile, step, half, dropped, out, plane, images, next_image, checks, sums):
    if limbs == 1:
        pack_line(1, tile, step, half, dropped, out, plane, images, next_image, checks, sums)
    elif limbs == 2:
        pack_line(2, tile, step, half, dropped, out, plane, images, next_image, checks, sums)
    elif limbs == 3:
        pack_line(3, tile, step, half, dropped, out, plane, images, next_image, checks, sums)
    else:
        pack_line(4, tile, step, half, dropped, out, plane, images, next_image, checks, sums)


@inlined
def _unpack(limbs, source, plane, dropped, tile, step, vectors, checks, sums):
    if limbs == 1:
        unpack_line(1, source, plane, dropped, tile, step, vectors, checks, sums)
    elif limbs == 2:
        unpack_line(2, source, plane, dropped, tile, step, vectors, checks, sums)
    elif limbs == 3:
        unpack_line(3, source, plane, dropped, tile, step, vectors, checks, sums)
    else:
        unpack_line(4, source, plane, dropped, tile, step, vectors, checks, sums)


@inlined
def _bring_near(vectors, rows, row, at, width, near):
    """Copies `width` (at most 64) numbers of each row into lines of 64. The rows themselves lie a multiple of 4096 bytes
    apart, so that those of a tile would all compete for the same few places of the first-level cache."""
    for r in range(rows):
        for k in range(width):
            near[64 * r + k] = vectors[r * row + at + k]


@compiled
def encrypt(
    matrix, first, features, rank, n, roots, secrets, tokens, x, x_at, x_row, inverse_scale, factors,
    error, planes, p_at, plane, p_row, limbs, tile, work, images, image_row, image_at, near, checks, variants, sums
):  # fmt: skip
    """Encrypts `tokens` tokens of `features` features, of which the first is in group `first` of the matrix.

    matrix: float64, the transformed rows of A `[groups, rank, n, 2, 8]`. secrets: float64 `[blocks, rank, n, 2]`,
    divided by n. x: float32, feature j of token t at `x_at + t·x_row + j`; times factors `[features]` and inverse_scale
    `[tokens]`, float64, it is rounded to an integer. error: int8, at `t·features + j`. planes: uint8, byte l of a word at
    `p_at + l·plane + t·p_row + j`. tile: int32, `tile_words(tokens)` of scratch; work: float64, 16·n of scratch.
    For verification, sums `[tokens, checks, SUM_LANES]` int32 grows, in total over the last axis, by Σ_j sent_j ·
    images[(variants[t]·checks + c)·image_row + image_at + j], of the words shifted down by the bytes that are not sent.
    near: int32, 64 of scratch for each row of images.
    """
    stride = 8 * tokens + _PADDING
    span = 8 * tile_groups(tokens)
    dropped = 8 * (4 - limbs)
    half = (1 << dropped) >> 1
    root_count = roots.size
    x_, scale_, factor_, error_ = address(x), address(inverse_scale), address(factors), address(error)
    matrix_, roots_, secrets_ = address(matrix), address(roots), address(secrets)
    tile_, work_, planes_, near_ = address(tile), address(work), address(planes), address(near)
    rows = images.size // image_row
    sums_ = address(sums)
    for j in range(0, features, span):
        width = min(span, features - j)
        whole, groups = width // 8, (width + 7) // 8
        for t in range(tokens):
            scale = broadcast(scale_, t)
            for k in range(0, 4 * width, 64):
                prefetch(x_, 4 * (x_at + (t + _AHEAD) * x_row + j) + k)
            for g in range(whole):
                k = j + 8 * g
                real = load_f32(x_, x_at + t * x_row + k) * load_f64(factor_, k) * scale
                store_i32(tile_, g * stride + 8 * t, round_mod_2_32(real) + load_i8(error_, t * features + k))
            for k in range(8 * whole, width):
                value = np.float64(x[x_at + t * x_row + j + k]) * factors[j + k] * inverse_scale[t]
                tile[whole * stride + 8 * t + k - 8 * whole] = np.int64(np.rint(value)) + error[t * features + j + k]
        for g in range(groups):
            base = (first + j // 8 + g) * rank * 16 * n
            _add_inner_product(
                matrix_, base, rank, n, roots_, root_count, secrets_, tokens, tile_, g * stride, work_, False
            )
        _bring_near(images, rows, image_row, image_at + j, width, near)
        for t in range(tokens):
            out = p_at + t * p_row + j
            for limb in range(limbs):
                prefetch_to_write(planes_, out + limb * plane + _AHEAD * p_row)
            image = variants[t] * checks * 64
            if whole == TILE_GROUPS:
                _pack(
                    limbs, tile_ + 32 * t, 4 * stride, half, dropped, planes_ + out, plane,
                    near_ + 4 * image, 256, checks, sums_ + 4 * SUM_LANES * checks * t,
                )  # fmt: skip
                continue
            for c in range(checks):
                for k in range(width):
                    sent = (np.int64(tile[k // 8 * stride + 8 * t + k % 8]) + half) >> dropped
                    sums[(t * checks + c) * SUM_LANES] += sent * near[image + 64 * c + k]
            for limb in range(limbs):
                for g in range(whole):
                    word = load_i32(tile_, g * stride + 8 * t) + splat_i32(half)
                    store_u8(planes_, out + limb * plane + 8 * g, shift_right(word, dropped + 8 * limb))
                for k in range(8 * whole, width):
                    word_ = np.int64(tile[whole * stride + 8 * t + k - 8 * whole]) + half
                    planes[out + limb * plane + k] = np.uint8((word_ >> (dropped + 8 * limb)) & 255)


@compiled
def decrypt(
    hint, kept, first, features, rank, n, roots, secrets, tokens, planes, p_at, plane, p_row, limbs, scale, factors,
    result, r_at, r_row, tile, values, work, vectors, vector_row, vector_at, near, checks, check_features, variants, sums
):  # fmt: skip
    """Decrypts `tokens` tokens of `features` features, of which the first is in group `first` of the hint.

    hint: int32, rows of H `[groups, rank, 2n, 8]`, and kept: empty, or their transforms, float64 `[groups, rank, n, 2, 8]`,
    which are then used instead. planes: uint8, byte l of the reply at `p_at + l·plane + t·p_row + j`.
    result: float32 at `r_at + t·r_row + j`: the word times scale `[tokens]` times factors `[features]`, float64.
    values: float64, rank · 16 · n of scratch. The rest is as in `encrypt`.
    For verification, sums `[tokens, checks, SUM_LANES]` int32 grows, in total over the last axis, by Σ_j word_j ·
    vectors[variants[t]·vector_row + vector_at + j], of the words shifted down by the bytes that were not sent, in the place
    of the check that feature vector_at + j belongs to: `check_features` (a multiple of 64, as is vector_at) each, counted
    from that of vector_at.
    near: int32, 64 of scratch for each row of vectors.
    """
    stride = 8 * tokens + _PADDING
    span = 8 * tile_groups(tokens)
    root_count = roots.size
    hint_, kept_, roots_, secrets_ = address(hint), address(kept), address(roots), address(secrets)
    keep, planes_ = kept.size > 0, address(planes)
    scale_, factor_, result_, near_ = address(scale), address(factors), address(result), address(near)
    tile_, values_, work_, sums_ = address(tile), address(values), address(work), address(sums)
    dropped, rows = 32 - 8 * limbs, vectors.size // vector_row
    for j in range(0, features, span):
        width = min(span, features - j)
        whole, groups = width // 8, (width + 7) // 8
        check = (vector_at + j) // check_features - vector_at // check_features if checks > 0 else 0
        _bring_near(vectors, rows, vector_row, vector_at + j, width, near)
        for t in range(tokens):
            at = p_at + t * p_row + j
            vector, sum_at = 64 * variants[t], (t * checks + check) * SUM_LANES
            for limb in range(limbs):
                prefetch(planes_, at + limb * plane + _AHEAD * p_row)
            if whole == TILE_GROUPS:
                _unpack(
                    limbs, planes_ + at, plane, dropped, tile_ + 32 * t, 4 * stride,
                    near_ + 4 * vector, min(checks, 1), sums_ + 4 * sum_at,
                )  # fmt: skip
                continue
            for g in range(whole):
                word = splat_i32(0)
                for limb in range(limbs):
                    byte = load_u8(planes_, at + limb * plane + 8 * g)
                    word = word | shift_left(byte, 8 * (4 - limbs + limb))
                store_i32(tile_, g * stride + 8 * t, word)
            for k in range(8 * whole, width):
                word_ = np.int64(0)
                for limb in range(limbs):
                    word_ |= np.int64(planes[at + limb * plane + k]) << (8 * (4 - limbs + limb))
                tile[whole * stride + 8 * t + k - 8 * whole] = word_
            if checks > 0:
                for k in range(width):
                    sums[sum_at] += (np.int64(tile[k // 8 * stride + 8 * t + k % 8]) >> dropped) * near[vector + k]
        for g in range(groups):
            base = (first + j // 8 + g) * rank * 16 * n
            if keep:
                matrix, start = kept_, base
            else:
                matrix, start = values_, 0
                for i in range(rank):
                    forward_at(hint_, base + i * 16 * n, n, roots_, values_, i * 16 * n)
            _add_inner_product(
                matrix, start, rank, n, roots_, root_count, secrets_, tokens, tile_, g * stride, work_, True
            )
        for t in range(tokens):
            factor = broadcast(scale_, t)
            for k in range(0, 4 * width, 64):
                prefetch_to_write(result_, 4 * (r_at + (t + _AHEAD) * r_row + j) + k)
            for g in range(whole):
                k = j + 8 * g
                real = to_f64(load_i32(tile_, g * stride + 8 * t)) * factor * load_f64(factor_, k)
                store_f32(result_, r_at + t * r_row + k, real + splat(0.0))
            for k in range(8 * whole, width):
                word_ = tile[whole * stride + 8 * t + k - 8 * whole]
                result[r_at + t * r_row + j + k] = np.float64(word_) * scale[t] * factors[j + k] + 0.0


@compiled
def add_lanes(sums, dropped, totals):
    """totals int32, flat, grows by the sums [..., SUM_LANES] int32, flat, over their lanes, times 2^dropped, mod 2^32."""
    for i in range(totals.size):
        total = np.int64(0)
        for lane in range(SUM_LANES):
            total += sums[i * SUM_LANES + lane]
        totals[i] += total << dropped


@compiled
def row_norms(x, x_row, features, tokens, factors, largest, squares):
    """Of each row of x · factors: the largest magnitude and the sum of squares, both float64 `[tokens]`.

    The sum is not finite where an x is not; the maximum may then be anything.
    """
    x_, factor_ = address(x), address(factors)
    whole = features // 8 * 8
    lanes = np.empty(16)
    for t in range(tokens):
        top, total = splat(0.0), splat(0.0)
        for k in range(0, whole, 8):
            value = load_f32(x_, t * x_row + k) * load_f64(factor_, k)
            top = maximum(top, absolute(value))
            total = fma(value, value, total)
        store_f64(address(lanes), 0, top)
        store_f64(address(lanes), 8, total)
        peak, length = lanes[0], lanes[8]
        for k in range(1, 8):
            peak = max(peak, lanes[k])
            length += lanes[8 + k]
        for k in range(whole, features):
            last = np.float64(x[t * x_row + k]) * factors[k]
            peak = max(peak, abs(last))
            length += last * last
        largest[t], squares[t] = peak, length


def tile_words(tokens: int) -> int:
    """int32 of scratch that `encrypt` and `decrypt` want for a tile."""
    return max(2, min(TILE_GROUPS, _TILE_TOKENS // max(1, tokens))) * (8 * tokens + _PADDING)
