"""The compiled part of `aggregation.py`: masks ⟨A, s⟩ of eight rows of A at a time, straight from the public stream.

The words of a group are read in the order in which the kernels hold them, `[rank, ring_dim, 8]`: A is uniform, so this
order is as good as any, and neither A nor the masks are ever put into another one.
"""

# mypy: disallow-untyped-defs = False
from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hecompile.he.kernels.inverse_transform import inner_product, last_join4
from hecompile.he.kernels.jit import compiled
from hecompile.he.kernels.scratch import scratch
from hecompile.he.kernels.simd import round_mod_2_32
from hecompile.he.kernels.threads import for_each
from hecompile.he.kernels.transform import aligned, forward_at, roots
from hecompile.he.kernels.vectors import LANES, address, store_i32
from hecompile.he.parameters import RingParameters
from hecompile.he.random.sampling import PublicStream


@compiled
def _mask_group(words, rank, n, roots, secret, values, work, mask):
    """int32 `[rank, 2n, 8]` of A and the transformed secret `[rank, n, 2]` → int32 `[2n, 8]`, mod 2^32."""
    words_, roots_, values_, work_ = address(words), address(roots), address(values), address(work)
    to = address(mask)
    for k in range(rank):
        forward_at(words_, 16 * n * k, n, roots_, values_, 16 * n * k)
    # Nothing is asked for ahead: the words of the next group are not there yet.
    h, _ = inner_product(values_, 0, address(secret), 0, 2 * n, rank, n, n, roots_, roots.size, work_, values_, 0)
    for p in range(h):
        r0, i0, r1, i1, r2, i2, r3, i3 = last_join4(work_, 16 * p, 16 * h, roots_)
        store_i32(to, 8 * p, round_mod_2_32(r0))
        store_i32(to, 8 * (p + h), round_mod_2_32(r1))
        store_i32(to, 8 * (p + 2 * h), round_mod_2_32(r2))
        store_i32(to, 8 * (p + 3 * h), round_mod_2_32(r3))
        store_i32(to, 8 * (p + n), round_mod_2_32(i0))
        store_i32(to, 8 * (p + n + h), round_mod_2_32(i1))
        store_i32(to, 8 * (p + n + 2 * h), round_mod_2_32(i2))
        store_i32(to, 8 * (p + n + 3 * h), round_mod_2_32(i3))


def masks(params: RingParameters, stream: PublicStream, secret: NDArray[np.float64], count: int) -> NDArray[np.int32]:
    """The first `count` coordinates of ⟨A, s⟩ mod 2^32: int32 `[count]`.

    Coordinate 8·d·g + 8·c + l is coefficient c of row 8·g + l of A. `secret` comes from `kernels.transform_secrets`.
    """
    size, n = LANES * params.ring_dim, params.ring_dim // 2
    groups = -(-count // size)
    result = aligned(groups * size, np.int32)

    def group(index: int) -> None:
        words = scratch("aggregation words", size * params.rank, np.int32)
        words[:] = stream.uint32(index, size * params.rank).view(np.int32)
        values = scratch("aggregation values", size * params.rank, np.float64)
        work = scratch("aggregation work", size, np.float64)
        mask = result[index * size : (index + 1) * size]
        _mask_group(words, params.rank, n, roots(params), secret, values, work, mask)

    for_each(group, range(groups))
    return result[:count]
