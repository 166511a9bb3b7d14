"""Decrypt tile by tile: the client's hot loop on a worker's reply."""

# mypy: disallow-untyped-defs = False
from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hecompile.he.kernels.arguments import (
    CheckSums,
    Extent,
    HintArrays,
    Planes,
    Prefetch,
    Ring,
    Rows,
    Scales,
    Scratch,
    Secrets,
    Strided,
)
from hecompile.he.kernels.hint_words import unpack_group
from hecompile.he.kernels.jit import compiled, inlined
from hecompile.he.kernels.line_bytes import unpack
from hecompile.he.kernels.lines import (
    SUM_LANES,
    add_byte_dot,
    group_of,
    line_shifted_up,
    load_line,
    load_words,
    no_words,
)
from hecompile.he.kernels.simd import to_f64
from hecompile.he.kernels.tiles import (
    AHEAD,
    PADDING,
    WIDTH,
    join_lanes,
    mask_group,
    prefetch_drawn,
)
from hecompile.he.kernels.transform import forward_at
from hecompile.he.kernels.vectors import (
    address,
    broadcast,
    load_f64,
    prefetch,
    prefetch_to_write,
    real_address,
    splat,
    store_f32,
)


def decrypt(
    ring: Ring, extent: Extent, hint: HintArrays, secrets: NDArray[Any], planes: Planes, scales: Scales, result: Rows,
    checks: CheckSums, scratch: Scratch,
) -> None:  # fmt: skip
    """Decrypt the tokens and features of `extent`.

    Args:
        ring: `Ring`; its roots, transformed hints, secrets and scratch are all float64 or all float32.
        extent: `Extent`.
        hint: `HintArrays`.
        secrets: real `[blocks, rank, n, 2]`, divided by n.
        planes: `Planes`, the reply.
        scales: `Scales`, what words are multiplied with: the scale of each token and a factor for each feature.
        result: `Rows`, written.
        checks: `CheckSums`: a feature adds to the sum of the check that covers it.
        scratch: `Scratch`, whose tile has exactly `tile_words(tokens)` words.
    """
    _decrypt(*ring, *extent, *hint, secrets, *planes, *scales, *result, *checks, *scratch)


@compiled
def _decrypt(
    n, rank, packing, roots, root_count,
    first_group, features, tokens,
    hint, kept, packed, hint_bits,
    secrets,
    wire, start, plane, row_stride, bits, _,
    scale, factors,
    result, result_start, result_stride,
    vectors, drawn, variants, sums, window, totals, total_sums, check_features,
    tile, values, work,
):  # fmt: skip
    """Run `decrypt` on its arguments unpacked, a line for each: see `encrypt_tiles._encrypt`."""
    stride = 8 * tokens + PADDING
    limbs = (bits + 7) // 8
    dropped = 8 * (4 - limbs)
    ring = Ring(n, rank, packing, real_address(roots), root_count)
    hint_, kept_, secrets_ = address(hint), real_address(kept), real_address(secrets)
    keep, planes_, sums_, kept_at = kept.size > 0, address(wire), address(sums), address(kept)
    unpack_first, packed_, group_bytes = packed.size > 0, address(packed), 2 * hint_bits * n * rank
    scale_, factor_, result_, vectors_ = address(scale), address(factors), address(result), address(vectors)
    tile_, values_, work_ = address(tile), real_address(values), real_address(work)
    vector_rows, vectors_flat = vectors.shape[1], vectors.reshape(-1)
    check_count, total_sums_ = sums.shape[0], address(total_sums)
    group_size = rank * 16 * n
    for j in range(0, features, WIDTH):
        width = min(WIDTH, features - j)
        for g in range((width + 7) // 8):
            base = (first_group + j // 8 + g) * group_size
            if keep:
                matrix, ahead = Strided(kept_, base, 16 * n), kept_at + kept.itemsize * (base + group_size)
                ahead_size = kept.itemsize * group_size
            else:
                matrix, ahead = Strided(values_, 0, 16 * n), hint_ + 4 * (base + group_size)
                ahead_size = 4 * group_size
                if unpack_first:
                    packed_at = (first_group + j // 8 + g) * group_bytes
                    unpack_group(packed_, packed_at, 2 * n * rank, hint_bits, hint_, 0)
                    base, ahead, ahead_size = 0, packed_ + packed_at + group_bytes, group_bytes
                for i in range(rank):
                    forward_at(hint_, base + i * 16 * n, n, ring.roots, values_, i * 16 * n)
            mask_group(
                ring, matrix, Secrets(secrets_, 0, 1, rank), tokens, tile_ + 4 * g * stride, work_,
                Prefetch(ahead, ahead_size),
            )  # fmt: skip
        vectors_at, check = j * vector_rows, (8 * first_group + j) // check_features
        prefetch_drawn(vectors_ + vectors_at, WIDTH, drawn)
        for first_token in range(0, tokens, window):
            total = no_words()
            totals[:WIDTH] = 0
            for t in range(first_token, min(tokens, first_token + window)):
                at, r = start + t * row_stride + j, result_start + t * result_stride + j
                vector = vectors_at + WIDTH * variants[t]
                if width == WIDTH:
                    for limb in range(limbs):
                        prefetch(planes_, at + limb * plane + AHEAD * row_stride)
                    for k in range(0, 256, 64):
                        prefetch_to_write(result_, 4 * (r + AHEAD * result_stride) + k)
                    top = unpack(limbs, planes_ + at, plane)
                    if vector_rows > 0:
                        add_byte_dot(top, vectors_ + vector, sums_ + 4 * SUM_LANES * (check * tokens + t))
                        total += top
                    line = line_shifted_up(top, dropped) - load_line(tile_ + 32 * t, 4 * stride)
                    token_scale, feature_scale, to = broadcast(scale_, t), factor_ + 8 * j, result_ + 4 * r
                    _store_real(line, 0, token_scale, feature_scale, to)
                    _store_real(line, 1, token_scale, feature_scale, to)
                    _store_real(line, 2, token_scale, feature_scale, to)
                    _store_real(line, 3, token_scale, feature_scale, to)
                    _store_real(line, 4, token_scale, feature_scale, to)
                    _store_real(line, 5, token_scale, feature_scale, to)
                    _store_real(line, 6, token_scale, feature_scale, to)
                    _store_real(line, 7, token_scale, feature_scale, to)
                    continue
                for k in range(width):
                    word = np.int64(0)
                    for limb in range(limbs):
                        word |= np.int64(wire[at + limb * plane + k]) << (8 * limb)
                    if vector_rows > 0:
                        sums[check, t, 0] += word * vectors_flat[vector + k]
                        totals[k] += word
                    centred = np.int32((word << dropped) - tile[k // 8 * stride + 8 * t + k % 8])
                    result[r + k] = np.float64(centred) * scale[t] * factors[j + k] + 0.0
            if width < WIDTH:
                total = load_words(address(totals))
            for row in range(vector_rows):
                sum_at = (first_token // window * vector_rows + row) * check_count + check
                add_byte_dot(total, vectors_ + vectors_at + WIDTH * row, total_sums_ + 4 * SUM_LANES * sum_at)
    join_lanes(sums, dropped)
    join_lanes(total_sums, dropped)


@inlined
def _store_real(line, index, scale, factors, to):
    """Store eight words of a line as float32: word times scale times factor."""
    real = to_f64(group_of(line, index)) * scale * load_f64(factors, 8 * index)
    store_f32(to, 8 * index, real + splat(0.0))
