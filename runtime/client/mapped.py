"""Release the memory of arrays that lie in a file mapped read-only: their pages come back when they are read."""

from __future__ import annotations

import mmap

import numpy as np
from numpy.typing import NDArray

from hecompile.mapped_files import mapping_of


def release(array: NDArray[np.generic]) -> None:
    """Take the pages of `array` out of this process's memory; they stay in the system's file cache.

    Does nothing for an array that is not a read-only mapping of a file: the memory of any other would be lost.
    """
    if array.nbytes == 0 or not array.flags.c_contiguous or array.flags.writeable:
        return
    if (mapping := mapping_of(array)) is not None:
        mapping.madvise(mmap.MADV_DONTNEED, array.ctypes.data, array.nbytes)
        return
    pages = _pages_of(array)
    if pages is not None:
        start = array.ctypes.data - np.frombuffer(pages, dtype=np.uint8).ctypes.data
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        pages.madvise(mmap.MADV_DONTNEED, first, start + array.nbytes - first)


def _pages_of(array: NDArray[np.generic]) -> mmap.mmap | None:
    """Find the mapping of Python's own that a view goes back to."""
    base: object = array
    while isinstance(base, (np.ndarray, memoryview)):
        base = base.obj if isinstance(base, memoryview) else base.base
    return base if isinstance(base, mmap.mmap) else None
