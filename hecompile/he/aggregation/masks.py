"""Compute the masks ⟨A, s⟩ of aggregation, eight rows of A at a time, straight from the public stream.

The words of a group are read in the order in which the kernels hold them, `[rank, ring_dim, 8]`. A is uniform, so this order
is as good as any, and neither A nor the masks are ever put into another one.
"""

# mypy: disallow-untyped-defs = False
from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hecompile.he.kernels.arguments import Ring, Strided
from hecompile.he.kernels.inverse_transform import mask_block
from hecompile.he.kernels.jit import compiled
from hecompile.he.kernels.scratch import scratch
from hecompile.he.kernels.threads import for_each
from hecompile.he.kernels.transform import aligned, forward_at, ring_of
from hecompile.he.kernels.vectors import LANES, address
from hecompile.he.parameters import RingParameters
from hecompile.he.random.sampling import PublicStream


@compiled
def _mask_group(ring, words, secret, values, work, mask):
    """Multiply: int32 `[rank, 2n, 8]` of A and the transformed secret `[rank, n, 2]` → int32 `[2n, 8]`, mod 2^32."""
    n, rank = ring.n, ring.rank
    inner = Ring(n, rank, ring.packing, address(ring.roots), ring.root_count)
    for k in range(rank):
        forward_at(address(words), 16 * n * k, n, inner.roots, address(values), 16 * n * k)
    matrix, transformed = Strided(address(values), 0, 16 * n), Strided(address(secret), 0, 2 * n)
    # Nothing is prefetched: the words of the next group are not there yet.
    mask_block(inner, matrix, transformed, 2 * n, address(mask), address(work), address(values), 0)


def masks(params: RingParameters, stream: PublicStream, secret: NDArray[np.float64], count: int) -> NDArray[np.int32]:
    """Return the first `count` coordinates of ⟨A, s⟩ mod 2^32: int32 `[count]`.

    Coordinate 8·d·g + 8·c + l is coefficient c of row 8·g + l of A. `secret` comes from `transform.transform_secrets`.
    """
    size, ring = LANES * params.ring_dim, ring_of(params)
    groups = -(-count // size)
    result = aligned(groups * size, np.int32)

    def group(index: int) -> None:
        words = scratch("aggregation words", size * params.rank, np.int32)
        words[:] = stream.uint32(index, size * params.rank).view(np.int32)
        values = scratch("aggregation values", size * params.rank, np.float64)
        work = scratch("aggregation work", size, np.float64)
        mask = result[index * size : (index + 1) * size]
        _mask_group(ring, words, secret, values, work, mask)

    for_each(group, range(groups))
    return result[:count]
