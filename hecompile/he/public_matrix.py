"""The public matrix A: rows of R_q^rank, expanded from a public seed and transformed, one for the whole model."""

from __future__ import annotations

import threading

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hecompile.errors import InputError, SecurityError
from hecompile.he.kernels import aligned, interleave, transform
from hecompile.he.parameters import RingParameters
from hecompile.he.ring import negacyclic_fft
from hecompile.he.sampling import PublicSeed
from hecompile.he.threads import for_each
from hecompile.he.vectors import LANES


class PublicMatrix:
    """A ∈ R_q^(rows × rank), uniform. Row j is block j of the seed's stream "A", so it does not depend on `rows`.

    Rows are expanded when first used, in order, and kept transformed: 8 · rank · ring_dim bytes each (24 MiB for 2048 rows
    at lattice dimension 1536). Safe to use from several threads.

    Args:
        params: the ring.
        seed: public; draw one per bundle, so that work done against one bundle's A helps against no other.
        rows: as many as the widest circuit has input features.

    Raises:
        SecurityError: `seed` is anything but a PublicSeed.
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
        self._expanded = 0  # groups of LANES rows
        self._groups = -(-rows // LANES)
        # Never touched rows cost no memory: the operating system maps a page at its first write.
        self._values = aligned(self._groups * LANES * params.lattice_dim, np.float64)

    def coefficients(self, rows: slice) -> Tensor:
        """The coefficients of some rows, centred: int32 `[rows, rank, ring_dim]`."""
        start, stop, _ = rows.indices(self.rows)
        shape = (self.params.rank, self.params.ring_dim)
        words = np.empty((max(0, stop - start), *shape), dtype=np.uint32)
        for row in range(start, stop):
            # q = 2^32, so 32 uniform bits are a uniform residue; read as int32 they are its centred representative.
            words[row - start] = self._stream.uint32(row, self.params.lattice_dim).reshape(shape)
        return torch.from_numpy(words.view(np.int32))

    def fft(self, rows: slice) -> Tensor:
        """Some rows as `ring.NegacyclicFft.forward` has them: complex128 `[rank, rows, ring_dim/2]`. Made at each call."""
        return negacyclic_fft(self.params.ring_dim).forward(self.coefficients(rows)).transpose(0, 1)

    def transformed(self, rows: int) -> NDArray[np.float64]:
        """At least the first `rows` rows as the kernels want them: flat, `[groups, rank, ring_dim/2, 2, 8]`. Read only."""
        wanted = -(-rows // LANES)
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
        words = interleave(self.coefficients(slice(LANES * groups[0], LANES * (groups[-1] + 1))).flatten(1))
        transform(words, self.params.ring_dim, self._values[groups[0] * size : (groups[-1] + 1) * size])


_GROUPS_AT_ONCE = 16
