"""What the scale of a token is chosen from: the largest value and the length of its row, in one pass over memory."""

# mypy: disallow-untyped-defs = False
from __future__ import annotations

import numpy as np

from hecompile.he.simd import absolute, fma, maximum
from hecompile.he.vectors import address, load_f32, load_f64, splat, store_f64
from hecompile.jit import compiled


@compiled
def row_norms(x, x_row, features, tokens, factors, largest, squares):
    """Of each row of x · factors: the largest magnitude and the sum of squares, both float64 `[tokens]`.

    The sum is not finite where an x is not; the maximum may then be anything.
    """
    x_, factor_ = address(x), address(factors)
    whole, vectors = features // 32 * 32, features // 8 * 8
    lanes = np.empty(16)
    for t in range(tokens):
        row = t * x_row
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
        largest[t], squares[t] = peak, length
