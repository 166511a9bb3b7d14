"""Store hints H = W·A mod q: one file per circuit, memory-mapped, read ahead of its use and released after it.

A file holds the words of a hint in one of three forms:

    uint8 [groups, bits, rank · ring_dim]      rounded to 16 to 31 bits and packed (`kernels/hint_words.py`)
    int32 [groups, rank · ring_dim, 8]         whole
    float32 [groups, rank · ring_dim, 8]       their transform, where decryption is in float32 and no bit can be spared

Rounding them to `LinearParameters.hint_bits` is part of the noise that the parameters allow for. Packed words are unpacked
and transformed at each use: at 21 bits they are two thirds of the bytes to keep, to fetch and to read, and decrypting a
block of 512 tokens takes 1.6 times as long as from a transform in the file, which takes as much room as whole words.

Training visits every circuit in turn, over and over. Where the transformed hints of all circuits fit in memory (four or
eight bytes a word), they stay there. Otherwise all are streamed: the order of the last visit tells which come
next, the operating system is told to read those, and the pages of a used hint are given back. (Under such a cycle a cache
that is too small to hold everything saves little: it would hit for its share of the circuits alone.)
"""

from __future__ import annotations

import mmap
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hecompile.array_files import map_npy
from hecompile.errors import InputError
from hecompile.files import opened_whole, unreadable
from hecompile.he.hint_rounding import FEWEST_BITS, HINT_TERMS, WORD_BITS, terms
from hecompile.he.kernels.hint_words import pack_words, unpack_words
from hecompile.he.kernels.transform import deinterleave, interleave, transform
from hecompile.he.kernels.vectors import LANES
from hecompile.he.parameters import RingParameters
from hecompile.he.ring import folded_fft
from hecompile.mapped_files import Mapping, mapping_of

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
Precision = type[np.floating]

_NO_WORDS = np.empty(0, dtype=np.int32)
_NOT_PACKED = np.empty(0, dtype=np.uint8)

_READ_AHEAD = 4
"""Hints that are read ahead of the one in use: the circuits of one decoder layer in one direction."""


class Hint:
    """Hold the hint of one circuit: `rows` vectors of R_q^rank, eight side by side for the kernels.

    Args:
        params: the ring.
        stored: int32 `[groups, rank · ring_dim, 8]`, perhaps memory-mapped, as `interleave` makes it; or those words packed,
            uint8 `[groups, bits, rank · ring_dim]`; or their transform in float32, for decryption in float32 alone.
        rows: how many of the 8 · groups rows are real.
        keep_transformed: float64 or float32, to transform words once in that precision and keep the result; None, to
            transform them at each use.

    Raises:
        InputError: the shape or type does not fit the ring or the rows.
    """

    def __init__(
        self, params: RingParameters, stored: NDArray[Any], rows: int, keep_transformed: Precision | None = None
    ) -> None:
        groups = -(-rows // LANES)
        whole = (groups, params.lattice_dim, LANES)
        self.bits = _bits_of(stored, (groups, params.lattice_dim))
        if self.bits == 0 or (self.bits == WORD_BITS and stored.shape != whole) or rows < 1:
            raise InputError(
                f"a hint of {rows} rows for {params.ring_dim} x {params.rank} is int32 or float32 {list(whole)}, or packed, "
                f"got {stored.dtype} {list(stored.shape)}: run setup again with these parameters"
            )
        if self.bits < WORD_BITS and terms(params) > HINT_TERMS:
            ring = f"{params.ring_dim} x {params.rank}"
            raise InputError(f"rounded hints are for smaller rings than {ring}: make the bundle again")
        self.params = params
        self.rows = rows
        self.words: NDArray[np.int32] = _NO_WORDS
        self.packed: NDArray[np.uint8] = _NOT_PACKED
        self.transformed: NDArray[Any] | None = None
        if stored.dtype == np.float32:
            self.transformed = stored.reshape(-1)
            return
        if self.bits < WORD_BITS and keep_transformed is None:
            self.packed = stored.reshape(-1)
            return
        self.words = self._unpacked(stored.reshape(-1)) if self.bits < WORD_BITS else stored.reshape(-1)
        if keep_transformed is not None:
            self.transformed = transform(self.words, params, precision=keep_transformed)

    @classmethod
    def from_coefficients(
        cls,
        params: RingParameters,
        coefficients: Tensor,
        keep_transformed: Precision | None = None,
        bits: int = WORD_BITS,
    ) -> Hint:
        """Make a hint of what `setup` returns: int32 `[out_features, rank · ring_dim]`, rounded to `bits` bits.

        Raises:
            InputError: it has another type or shape.
        """
        if coefficients.dtype != torch.int32 or coefficients.dim() != 2 or len(coefficients) == 0:
            raise InputError(f"a hint is int32 [out, rank * ring_dim], got {coefficients.dtype}")
        return cls(params, _stored_form(coefficients, bits), len(coefficients), keep_transformed)

    def coefficients(self, rows: slice) -> Tensor:
        """Return some rows: int32 `[rows, rank · ring_dim]`, a copy.

        Raises:
            InputError: this is a float32 transform.
        """
        self.check_precision(np.float64)
        start, stop, _ = rows.indices(self.rows)
        words, before = self.words, start // LANES * LANES
        if self.packed.size:
            group = self.bits * self.params.lattice_dim
            words = self._unpacked(self.packed[before // LANES * group : -(-stop // LANES) * group])
            start, stop = start - before, stop - before
        return torch.from_numpy(deinterleave(words, slice(start, stop), self.params.lattice_dim))

    def _unpacked(self, packed: NDArray[np.uint8]) -> NDArray[np.int32]:
        return unpack_words(packed, self.params.lattice_dim, self.bits)

    def check_precision(self, precision: Precision) -> None:
        """Check that this hint can decrypt in `precision`.

        Raises:
            InputError: it is a float32 transform, and `precision` is not float32.
        """
        if self.words.size == self.packed.size == 0 and precision is not np.float32:
            raise InputError("this hint was made for decryption in float32 alone: make the bundle again")

    def fft(self, rows: slice) -> Tensor:
        """Transform some rows, at each call, as `ring.FoldedFft.forward` does: complex128 `[rank, rows, ring_dim/2]`."""
        shaped = self.coefficients(rows).view(-1, self.params.rank, self.params.ring_dim)
        return folded_fft(self.params).forward(shaped.transpose(0, 1))


def _bits_of(stored: NDArray[Any], whole: tuple[int, int]) -> int:
    """Return the bits of a word of `stored`, for (groups, lattice dimension); 0 where it is no hint of that size."""
    if stored.dtype in (np.int32, np.float32):
        return WORD_BITS
    packed = stored.dtype == np.uint8 and stored.ndim == 3 and FEWEST_BITS <= stored.shape[1] < WORD_BITS
    return stored.shape[1] if packed and stored.shape[::2] == whole else 0


def _stored_form(hint: Tensor, bits: int) -> NDArray[Any]:
    """Return what a file holds of int32 `[out_features, rank · ring_dim]`, rounded to that many bits."""
    lattice_dim = hint.shape[1]
    words = interleave(hint)
    return words.reshape(-1, lattice_dim, LANES) if bits == WORD_BITS else pack_words(words, lattice_dim, bits)


def _path(directory: Path, circuit: str) -> Path:
    if not _NAME.fullmatch(circuit):
        raise InputError(f"{circuit!r} cannot name a circuit: use letters, digits, dots, dashes and underscores")
    return directory / f"{circuit}.npy"


def write_hint(
    directory: Path, circuit: str, hint: Tensor, single: RingParameters | None = None, bits: int = WORD_BITS
) -> Path:
    """Write the hint of `circuit` to `<directory>/<circuit>.npy`, whole or not at all, and return the path.

    Args:
        directory: made if it is missing.
        circuit: its name.
        hint: int32 `[out_features, rank · ring_dim]`, as `setup` makes it; the file has eight rows side by side.
        single: the ring, to write the float32 transform of whole words, for circuits that are decrypted in float32; None,
            for the words.
        bits: of a stored word, 16 to 32; below 32 they are rounded and packed, whatever `single` is.

    Raises:
        InputError: the hint has another type or shape, or `circuit` cannot be the name of a file.
    """
    path = _path(directory, circuit)
    if hint.dtype != torch.int32 or hint.dim() != 2 or len(hint) == 0:
        raise InputError(f"the hint of {circuit} must be int32 [out, rank * ring_dim], got {hint.dtype}")
    directory.mkdir(parents=True, exist_ok=True)
    stored = _stored_form(hint, bits)
    if single is not None and bits == WORD_BITS:
        stored = transform(stored.reshape(-1), single, precision=np.float32).reshape(stored.shape)
    with opened_whole(path) as file:
        np.save(file, stored)
    return path


def _word_bytes(path: Path) -> int:
    """Return what a hint file takes with words of 32 bits; its own size where it cannot be read, which its use will tell."""
    size = path.stat().st_size
    try:
        stored = map_npy(path)
    except (ValueError, OSError):
        return size
    return size * WORD_BITS // stored.shape[1] if stored.dtype == np.uint8 and stored.ndim == 3 else size


class HintStore:
    """Serve the hints of a folder, each opened at its first use. Safe to use from several threads.

    Args:
        directory: where `write_hint` wrote.
        params: the ring that they were made for.
        cache_bytes: memory that the transformed hints of the folder may take together, at most twice their whole words. If
            they need more, each is read from the mapped file at each use, and transformed unless the file has the transform.
    """

    def __init__(self, directory: Path, params: RingParameters, cache_bytes: int) -> None:
        self.directory = directory
        self.params = params
        self.cached = 2 * sum(map(_word_bytes, directory.glob("*.npy"))) <= cache_bytes
        self._hints: dict[str, Hint] = {}
        self._maps: dict[str, Mapping] = {}
        self._next: dict[str, str] = {}  # circuit → the one used after it
        self._last: str | None = None
        self._lock = threading.Lock()

    def hint(self, circuit: str, rows: int, precision: Precision = np.float64) -> Hint:
        """Return the hint of `circuit`, e.g. "model.layers.0.self_attn.qkv_proj.forward", which has `rows` output features.

        `precision` is that of its decryption. A hint that is kept transformed is transformed in it.

        Raises:
            InputError: there is no such hint, its file is damaged, or it belongs to another ring or circuit.
        """
        with self._lock:
            if circuit not in self._hints:
                stored, mapping = self._open(circuit)
                hint = Hint(self.params, stored, rows, precision if self.cached else None)
                hint.check_precision(precision)
                self._hints[circuit] = hint
                if not self.cached:
                    self._maps[circuit] = mapping
                elif stored.dtype != np.float32:
                    mapping.madvise(mmap.MADV_DONTNEED)
            if self._last is not None:
                self._next[self._last] = circuit
            self._last = circuit
            self._read_ahead(circuit)
            return self._hints[circuit]

    def release(self, circuit: str) -> None:
        """Release a hint that has been used: its pages leave this process, and stay in the system's file cache."""
        with self._lock:
            if circuit in self._maps:
                self._maps[circuit].madvise(mmap.MADV_DONTNEED)

    def _read_ahead(self, circuit: str) -> None:
        for _ in range(_READ_AHEAD):
            if (following := self._next.get(circuit)) is None:
                return
            circuit = following
            if circuit in self._maps:
                self._maps[circuit].madvise(mmap.MADV_WILLNEED)  # starts reading in the background and returns

    def _open(self, circuit: str) -> tuple[NDArray[Any], Mapping]:
        path = _path(self.directory, circuit)
        if not path.is_file():
            raise InputError(f"there is no hint for {circuit} in {self.directory}: run setup for it")
        try:
            stored = map_npy(path)
        except (ValueError, OSError) as error:
            raise unreadable(f"the hint file {path}", error, "run setup again") from error
        mapping = mapping_of(stored)
        assert mapping is not None
        return stored, mapping
