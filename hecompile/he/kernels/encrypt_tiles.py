"""Encrypt tile by tile: the client's hot loop on the way to the worker."""

# mypy: disallow-untyped-defs = False
from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hecompile.he.kernels.arguments import (
    CheckSums,
    Extent,
    Planes,
    Prefetch,
    Ring,
    Rows,
    Scales,
    Scratch,
    Secrets,
    Strided,
)
from hecompile.he.kernels.jit import compiled, inlined
from hecompile.he.kernels.line_bytes import pack, pack_past_caches
from hecompile.he.kernels.lines import (
    GROUPS,
    LINE_BYTES,
    SUM_LANES,
    add_dot,
    add_words,
    line_of,
    line_shifted_up,
    load_line,
    load_words,
    no_words,
    stores_done,
    top_of_line,
)
from hecompile.he.kernels.simd import round_mod_2_32
from hecompile.he.kernels.tiles import (
    AHEAD,
    PADDING,
    WIDTH,
    join_lanes,
    mask_group,
    prefetch_drawn,
)
from hecompile.he.kernels.vectors import (
    address,
    broadcast,
    load_f32,
    load_f64,
    load_i8,
    prefetch,
    prefetch_to_write,
)


def encrypt(
    ring: Ring, extent: Extent, matrix: NDArray[np.float64], secrets: NDArray[np.float64], x: Rows, scales: Scales,
    error: NDArray[np.int8], planes: Planes, checks: CheckSums, scratch: Scratch,
) -> None:  # fmt: skip
    """Encrypt the tokens and features of `extent`.

    Args:
        ring: `Ring`.
        extent: `Extent`.
        matrix: float64, the transformed rows of A, `[groups, rank, n, 2, 8]`; or ring elements that serve `packing` = rank
            groups each, one after the other.
        secrets: float64 `[blocks, rank, n, 2]`, divided by n; for a packed ring extended by `extend_secrets`: of an element
            a, group k gets Σ_i a_i times number rank - 1 + k - i of them.
        x: `Rows`, which times `scales` are rounded to integers.
        scales: `Scales`, the inverse scale of each token and a factor for each feature.
        error: int8, at `t · features + j`.
        planes: `Planes`, written.
        checks: `CheckSums`, with the images as vectors; the word that counts is the one that is sent.
        scratch: `Scratch`, whose tile has exactly `tile_words(tokens)` words.
    """
    _encrypt(*ring, *extent, matrix, secrets, *x, *scales, error, *planes, *checks, *scratch)


@compiled
def _encrypt(
    n, rank, packing, roots, root_count,
    first_group, features, tokens,
    matrix, secrets,
    x, x_start, x_stride,
    inverse_scale, factors,
    error,
    wire, start, plane, row_stride, bits, past_caches,
    images, drawn, variants, sums, window, totals, total_sums, _,
    tile, values, work,
):  # fmt: skip
    """Run `encrypt` on its arguments unpacked, a line for each: as tuples they would cost each call 15 µs and not 4."""
    stride = 8 * tokens + PADDING
    lines = tile.size // (GROUPS * stride)
    ahead = max(1, AHEAD // lines)
    run = 1  # tokens that one line is made of before the next line: words are added up in registers meanwhile
    while 2 * run <= min(8, window):
        run *= 2
    limbs, rounded = (bits + 7) // 8, 32 - bits
    dropped, unused, half = 8 * (4 - limbs), 8 * limbs - bits, (1 << rounded) >> 1
    ring = Ring(n, rank, packing, address(roots), root_count)
    x_, scale_, factor_, error_ = address(x), address(inverse_scale), address(factors), address(error)
    matrix_, secrets_ = address(matrix), address(secrets)
    tile_, work_, planes_ = address(tile), address(work), address(wire)
    images_, sums_, image_rows, images_flat = address(images), address(sums), images.shape[1], images.reshape(-1)
    check_count, windows, totals_, total_sums_ = (
        sums.shape[0],
        total_sums.shape[0],
        address(totals),
        address(total_sums),
    )
    group_size = rank * 16 * n
    per_block, step = (rank, 1) if packing == 1 else (2 * rank - 1, -1)
    ahead_size = 8 * group_size // packing
    aligned = (planes_ + start) % LINE_BYTES == 0 and plane % LINE_BYTES == 0 and row_stride % LINE_BYTES == 0
    past_caches = past_caches and aligned
    for j in range(0, features, WIDTH * lines):
        columns = min(WIDTH * lines, features - j)
        for g in range((columns + 7) // 8):
            group = first_group + j // 8 + g
            base, component = group // packing * group_size, group % packing
            first = 0 if packing == 1 else rank - 1 + component
            mask_group(
                ring, Strided(matrix_, base, 16 * n), Secrets(secrets_, first, step, per_block), tokens,
                tile_ + 4 * g * stride, work_,
                Prefetch(matrix_ + 8 * (base + group_size) + component * ahead_size, ahead_size),
            )  # fmt: skip
        for c in range(0, columns - WIDTH + 1, WIDTH):
            prefetch_drawn(images_ + 4 * (j + c) * image_rows, 4 * WIDTH * check_count, drawn)
        totals[: windows * lines * WIDTH] = 0
        for first_token in range(0, tokens, run):
            for c in range(0, columns, WIDTH):
                width, i, masks = min(WIDTH, columns - c), j + c, 4 * stride * (c // 8)
                total_at = WIDTH * lines * (first_token // window) + c
                total = no_words()
                for t in range(first_token, min(tokens, first_token + run)):
                    row, e, out = x_start + t * x_stride + i, t * features + i, start + t * row_stride + i
                    image = i * image_rows + WIDTH * variants[t] * check_count
                    if width == WIDTH:
                        scale = broadcast(scale_, t)
                        x_at, e_at, to = x_ + 4 * row, error_ + e, factor_ + 8 * i
                        for k in range(0, 256, 64):
                            prefetch(x_at, 4 * ahead * x_stride + k)
                        prefetch(e_at, ahead * features)
                        if not past_caches:
                            for limb in range(limbs):
                                prefetch_to_write(planes_, out + limb * plane + ahead * row_stride)
                        plain = line_of(
                            _encoded(x_at, to, scale, e_at, 0), _encoded(x_at, to, scale, e_at, 8),
                            _encoded(x_at, to, scale, e_at, 16), _encoded(x_at, to, scale, e_at, 24),
                            _encoded(x_at, to, scale, e_at, 32), _encoded(x_at, to, scale, e_at, 40),
                            _encoded(x_at, to, scale, e_at, 48), _encoded(x_at, to, scale, e_at, 56),
                        )  # fmt: skip
                        word = plain + load_line(tile_ + masks + 32 * t, 4 * stride)
                        top = line_shifted_up(top_of_line(word, half, rounded), unused)
                        if past_caches:
                            pack_past_caches(limbs, top, planes_ + out, plane)
                        else:
                            pack(limbs, top, planes_ + out, plane)
                        if check_count > 0:
                            add_dot(top, images_ + 4 * image, sums_ + 4 * SUM_LANES * t)
                        for check in range(1, check_count):
                            sum_at = SUM_LANES * (check * tokens + t)
                            add_dot(top, images_ + 4 * (image + WIDTH * check), sums_ + 4 * sum_at)
                        total += top
                        continue
                    for k in range(width):
                        value = np.int64(np.rint(np.float64(x[row + k]) * factors[i + k] * inverse_scale[t]))
                        number = value + error[e + k] + tile[(c + k) // 8 * stride + 8 * t + k % 8] + half
                        number = (number & 0xFFFFFFFF) >> rounded << unused
                        for limb in range(limbs):
                            wire[out + limb * plane + k] = np.uint8((number >> (8 * limb)) & 255)
                        for check in range(check_count):
                            sums[check, t, 0] += number * images_flat[image + WIDTH * check + k]
                        if windows > 0:
                            totals[total_at + k] += number
                if windows > 0:
                    add_words(total, totals_ + 4 * total_at)
        for c in range(0, columns, WIDTH):
            for w in range(windows):
                line, image = load_words(totals_ + 4 * (WIDTH * lines * w + c)), images_ + 4 * (j + c) * image_rows
                for row in range(image_rows):
                    add_dot(line, image + 4 * WIDTH * row, total_sums_ + 4 * SUM_LANES * (w * image_rows + row))
    join_lanes(sums, dropped)
    join_lanes(total_sums, dropped)
    stores_done()


@inlined
def _encoded(rows, factors, scale, errors, k):
    """Encode eight features of a token, from number `k` of its line: x times factor times scale, rounded, plus the error."""
    real = load_f32(rows, k) * load_f64(factors, k) * scale
    return round_mod_2_32(real) + load_i8(errors, k)
