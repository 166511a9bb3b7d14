"""Expand the public matrix A from a public seed: rows of R_q^rank, transformed, one matrix for the whole model."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hecompile.errors import InputError, SecurityError
from hecompile.he.kernels.ring_shape import trinomial
from hecompile.he.kernels.threads import for_each
from hecompile.he.kernels.transform import aligned, interleave, transform
from hecompile.he.kernels.vectors import LANES
from hecompile.he.parameters import RingParameters
from hecompile.he.random.sampling import PublicSeed
from hecompile.he.ring import folded_fft, times_y


class PublicMatrix:
    """Hold A ∈ R_q^(rows × rank), expanded from the seed's stream "A".

    Row j is block j of the stream, and uniform, however many rows there are. In a packed ring, block u is a ring element a
    = Σ_i a_i(Y)·X^i and serves m = rank rows, one in each of m groups of eight. With u = 8·g + l, row 8·(m·g + k) + l is
    row k of the matrix of multiplication by a,

        a_k, a_{k-1}, …, a_0, Y·a_{m-1}, …, Y·a_{k+1}

    (`ring.py`). Blocks are expanded at their first use, in order, and kept transformed: 8 · rank · ring_dim bytes each (24
    MiB for 2048 rows at lattice dimension 1536, 8 MiB in a packed ring of rank 3). Safe to use from several threads.

    Args:
        params: the ring.
        seed: public; draw one per bundle, so that work done against one bundle's A helps against no other.
        rows: as many as the widest circuit has input features.

    Raises:
        SecurityError: `seed` is anything but a PublicSeed.
        InputError: there are no rows.
    """

    def __init__(self, params: RingParameters, seed: PublicSeed, rows: int) -> None:
        if type(seed) is not PublicSeed:
            raise SecurityError("the public matrix is expanded from a PublicSeed and from nothing else")
        if rows < 1:
            raise InputError(f"a public matrix needs at least one row, got {rows}")
        self.params = params
        self.seed = seed
        self.rows = rows
        self._stream = seed.stream("A")
        self._lock = threading.Lock()
        self._expanded = 0  # groups of LANES blocks
        self._groups = -(-rows // (LANES * params.packing))
        # Never touched rows cost no memory: the operating system maps a page at its first write.
        self._values = aligned(self._groups * LANES * params.lattice_dim, np.float64)

    def coefficients(self, rows: slice) -> Tensor:
        """Return the coefficients of some rows, centred: int32 `[rows, rank, ring_dim]`."""
        start, stop, _ = rows.indices(self.rows)
        if not self.params.packed:
            return torch.from_numpy(self._blocks(range(start, stop)))
        rank, of_trinomial = self.params.rank, trinomial(self.params)
        index = np.arange(start, max(start, stop))
        block, component = index // (LANES * rank) * LANES + index % LANES, index // LANES % rank
        wanted, place = np.unique(block, return_inverse=True)
        elements = self._blocks(wanted.tolist())
        result = np.empty((len(index), rank, self.params.ring_dim), dtype=np.int32)
        for k in np.unique(component):
            of_component = component == k
            some = elements[place[of_component]]
            result[of_component, : k + 1] = some[:, k::-1]
            result[of_component, k + 1 :] = times_y(some[:, :k:-1], of_trinomial)
        return torch.from_numpy(result)

    def _blocks(self, blocks: Sequence[int]) -> NDArray[np.int32]:
        """Expand blocks of the stream, centred: int32 `[blocks, rank, ring_dim]`."""
        shape = (self.params.rank, self.params.ring_dim)
        words = np.empty((len(blocks), *shape), dtype=np.uint32)
        for place, block in enumerate(blocks):
            # q = 2^32, so 32 uniform bits are a uniform residue; read as int32 they are its centred representative.
            words[place] = self._stream.uint32(block, self.params.lattice_dim).reshape(shape)
        return words.view(np.int32)

    def fft(self, rows: slice) -> Tensor:
        """Transform some rows, at each call, as `ring.FoldedFft.forward` does: complex128 `[rank, rows, ring_dim/2]`."""
        return folded_fft(self.params).forward(self.coefficients(rows)).transpose(0, 1)

    def transformed(self, rows: int) -> NDArray[np.float64]:
        """Return blocks for at least the first `rows` rows, for the kernels: flat, `[groups, rank, ring_dim/2, 2, 8]`.

        The caller must not change them.
        """
        wanted = -(-rows // (LANES * self.params.packing))
        if wanted > self._expanded:
            with self._lock:
                groups = range(self._expanded, wanted)
                for_each(
                    self._expand, [groups[i : i + _GROUPS_AT_ONCE] for i in range(0, len(groups), _GROUPS_AT_ONCE)]
                )
                self._expanded = max(wanted, self._expanded)
        return self._values

    def _expand(self, groups: range) -> None:
        size = LANES * self.params.lattice_dim
        blocks = self._blocks(range(LANES * groups[0], LANES * (groups[-1] + 1)))
        words = interleave(blocks.reshape(len(blocks), -1))
        transform(words, self.params, self._values[groups[0] * size : (groups[-1] + 1) * size])


_GROUPS_AT_ONCE = 16
