"""The public matrix A: rows of R_q^rank expanded from a public seed, in the FFT domain, one for the whole model."""

from __future__ import annotations

import threading

import numpy as np
import torch
from torch import Tensor

from hecompile.errors import InputError, SecurityError
from hecompile.he.parameters import RingParameters
from hecompile.he.ring import negacyclic_fft, row_chunks
from hecompile.he.sampling import PublicSeed


class PublicMatrix:
    """A ∈ R_q^(rows × rank), uniform. Row j is block j of the seed's stream "A", so it does not depend on `rows`.

    Rows are expanded when first used, in order, and kept as complex128: 8 · rank · ring_dim bytes each (24 MiB for
    2048 rows at lattice dimension 1536). Safe to use from several threads.

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
        self._fft = negacyclic_fft(params.ring_dim)
        self._lock = threading.Lock()
        self._expanded = 0
        # Never touched rows cost no memory: the operating system maps a page at its first write.
        self._values = torch.empty((params.rank, rows, params.ring_dim // 2), dtype=torch.complex128)

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
        """Some rows in the FFT domain: complex128 `[rank, rows, ring_dim/2]`. A view: do not write to it."""
        _, stop, _ = rows.indices(self.rows)
        self._expand_to(stop)
        return self._values[:, rows]

    def inner_product(self, secret_fft: Tensor, rows: slice, tokens: int) -> Tensor:
        """The first `tokens` coefficients of ⟨A_j, s⟩ mod q: int32 `[rows, tokens]`.

        Args:
            secret_fft: complex128 `[rank, ring_dim/2]`.
            rows: which j.
            tokens: at most ring_dim.
        """
        return self._fft.inner_product(self.fft(rows), secret_fft, tokens)

    def _expand_to(self, stop: int) -> None:
        if stop <= self._expanded:
            return
        with self._lock:
            for chunk in row_chunks(stop, self.params.ring_dim):
                first = max(chunk.start, self._expanded)
                if first < chunk.stop:
                    values = self._fft.forward(self.coefficients(slice(first, chunk.stop)))  # [rows, rank, d/2]
                    self._values[:, first : chunk.stop] = values.transpose(0, 1)  # [rank, rows, d/2]
                    self._expanded = chunk.stop
