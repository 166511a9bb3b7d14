"""Hints H = W·A mod q: one file per circuit, memory-mapped, and as many as fit kept in the FFT domain.

Training visits every circuit in turn, over and over. Under such a cycle a cache that evicts the least recently used
entry never hits once it is too small, so nothing is evicted here: what came first stays.
"""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hecompile.errors import InputError
from hecompile.he.parameters import RingParameters
from hecompile.he.ring import negacyclic_fft, row_chunks

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")


class Hint:
    """The hint of one circuit: rows of R_q^rank, as int32 coefficients and perhaps in the FFT domain.

    Args:
        params: the ring.
        coefficients: int32 `[out_features, rank · ring_dim]`, perhaps memory-mapped.
        keep_fft: transform once and keep it (twice the size of the coefficients), or transform at each use.

    Raises:
        InputError: the shape or type does not fit the ring.
    """

    def __init__(self, params: RingParameters, coefficients: NDArray[np.int32] | Tensor, keep_fft: bool = True) -> None:
        array = coefficients.numpy() if isinstance(coefficients, Tensor) else coefficients
        if array.ndim != 2 or array.dtype != np.int32 or array.shape[1] != params.lattice_dim or len(array) == 0:
            raise InputError(
                f"a hint for {params.ring_dim} x {params.rank} is int32 [out, {params.lattice_dim}], "
                f"got {array.dtype} {list(array.shape)}: run setup again with these parameters"
            )
        self.params = params
        self.rows = len(array)
        self._coefficients = array
        self._values: Tensor | None = None
        if keep_fft:
            chunks = [self._transform(chunk) for chunk in row_chunks(self.rows, params.ring_dim)]
            self._values = torch.cat(chunks, dim=1)  # [rank, rows, d/2]

    def fft(self, rows: slice) -> Tensor:
        """Some rows in the FFT domain: complex128 `[rank, rows, ring_dim/2]`."""
        return self._transform(rows) if self._values is None else self._values[:, rows]

    def _transform(self, rows: slice) -> Tensor:
        # A copy: the mapping is read-only, which torch cannot express.
        part = torch.from_numpy(np.array(self._coefficients[rows]))
        shaped = part.view(-1, self.params.rank, self.params.ring_dim)  # [rows, rank, d]
        return negacyclic_fft(self.params.ring_dim).forward(shaped.transpose(0, 1))  # [rank, rows, d/2]


def _path(directory: Path, circuit: str) -> Path:
    if not _NAME.fullmatch(circuit):
        raise InputError(f"{circuit!r} cannot name a circuit: use letters, digits, dots, dashes and underscores")
    return directory / f"{circuit}.npy"


def write_hint(directory: Path, circuit: str, hint: Tensor) -> Path:
    """Writes the int32 hint of `circuit` to `<directory>/<circuit>.npy`, whole or not at all; returns the path."""
    path = _path(directory, circuit)
    if hint.dtype != torch.int32 or hint.dim() != 2:
        raise InputError(f"the hint of {circuit} must be int32 [out, rank * ring_dim], got {hint.dtype}")
    directory.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            np.save(file, hint.numpy())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


class HintStore:
    """The hints of a folder, opened when first asked for. Safe to use from several threads.

    Args:
        directory: where `write_hint` wrote.
        params: the ring they were made for.
        cache_bytes: how much memory the FFT forms of all hints together may take. Hints beyond it are transformed from
            the mapped file at each use: rank + 1 transforms per row instead of one.
    """

    def __init__(self, directory: Path, params: RingParameters, cache_bytes: int) -> None:
        self.directory = directory
        self.params = params
        self.cache_bytes = cache_bytes
        self.cached_bytes = 0
        self._hints: dict[str, Hint] = {}
        self._lock = threading.Lock()

    def hint(self, circuit: str) -> Hint:
        """The hint of `circuit`, e.g. "model.layers.0.self_attn.qkv_proj.forward".

        Raises:
            InputError: there is none, its file is damaged, or it belongs to another ring.
        """
        with self._lock:
            if circuit not in self._hints:
                coefficients = self._open(circuit)
                size = 2 * coefficients.nbytes
                keep = self.cached_bytes + size <= self.cache_bytes
                self._hints[circuit] = Hint(self.params, coefficients, keep_fft=keep)
                self.cached_bytes += size if keep else 0
            return self._hints[circuit]

    def _open(self, circuit: str) -> NDArray[np.int32]:
        path = _path(self.directory, circuit)
        if not path.is_file():
            raise InputError(f"there is no hint for {circuit} in {self.directory}: run setup for it")
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise InputError(f"the hint file {path} cannot be read ({error}): run setup again") from error
