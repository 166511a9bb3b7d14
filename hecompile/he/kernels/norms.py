"""Choose the scale of a token from the largest value and the length of its row, in one pass over memory."""

# mypy: disallow-untyped-defs = False
from __future__ import annotations

import numpy as np

from hecompile.he.kernels.jit import compiled
from hecompile.he.kernels.simd import absolute, fma, maximum
from hecompile.he.kernels.vectors import address, load_f32, load_f64, splat, store_f64

SMALLEST_SCALE = float(np.finfo(np.float64).tiny)
"""The scale of a token below which it is encoded as zeros."""


@compiled
def row_scales(x, factors, input_bound, norm_bound, scales):
    """Fill `scales` with the scale that `encode` chooses for each row of x · factors.

    A row that is to be encoded as zeros gets 0; a row with a value, or a sum of squares, that is not finite gets NaN.

    Args:
        x: float32, `[tokens, features]` flat.
        factors: float64 `[features]`.
        input_bound: see `LinearParameters`.
        norm_bound: see `LinearParameters`.
        scales: float64 `[tokens]`.
    """
    x_, factor_, features = address(x), address(factors), factors.size
    whole, vectors = features // 32 * 32, features // 8 * 8
    lanes = np.empty(16)
    for t in range(scales.size):
        row = t * features
        # Four at a time, side by side: each sum waits for its last addition.
        top0, top1, top2, top3 = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
        sum0, sum1, sum2, sum3 = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
        for k in range(0, whole, 32):
            v0 = load_f32(x_, row + k) * load_f64(factor_, k)
            v1 = load_f32(x_, row + k + 8) * load_f64(factor_, k + 8)
            v2 = load_f32(x_, row + k + 16) * load_f64(factor_, k + 16)
            v3 = load_f32(x_, row + k + 24) * load_f64(factor_, k + 24)
            top0, sum0 = maximum(top0, absolute(v0)), fma(v0, v0, sum0)
            top1, sum1 = maximum(top1, absolute(v1)), fma(v1, v1, sum1)
            top2, sum2 = maximum(top2, absolute(v2)), fma(v2, v2, sum2)
            top3, sum3 = maximum(top3, absolute(v3)), fma(v3, v3, sum3)
        for k in range(whole, vectors, 8):
            v0 = load_f32(x_, row + k) * load_f64(factor_, k)
            top0, sum0 = maximum(top0, absolute(v0)), fma(v0, v0, sum0)
        store_f64(address(lanes), 0, maximum(maximum(top0, top1), maximum(top2, top3)))
        store_f64(address(lanes), 8, (sum0 + sum1) + (sum2 + sum3))
        peak, length = lanes[0], lanes[8]
        for k in range(1, 8):
            peak = max(peak, lanes[k])
            length += lanes[8 + k]
        for k in range(vectors, features):
            last = np.float64(x[row + k]) * factors[k]
            peak = max(peak, abs(last))
            length += last * last
        scale = peak / input_bound
        if norm_bound > 0:
            scale = min(scale, np.sqrt(length) / norm_bound)
        if not np.isfinite(length):  # the maximum of vectors may then be anything
            scale = np.nan
        elif scale < SMALLEST_SCALE:
            scale = 0.0
        scales[t] = scale
