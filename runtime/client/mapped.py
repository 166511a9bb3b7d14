"""Release the memory of arrays that lie in a file mapped read-only: their pages come back when they are read."""

from __future__ import annotations

import mmap

import numpy as np
from numpy.typing import NDArray


def release(array: NDArray[np.generic]) -> None:
    """Take the pages of `array` out of this process's memory; they stay in the system's file cache.

    Does nothing for an array that is not a read-only mapping of a file: the memory of any other would be lost.
    """
    mapping = _mapping_of(array)
    if mapping is None or array.nbytes == 0 or not array.flags.c_contiguous:
        return
    start = array.ctypes.data - np.frombuffer(mapping, dtype=np.uint8).ctypes.data
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    mapping.madvise(mmap.MADV_DONTNEED, first, start + array.nbytes - first)


def _mapping_of(array: NDArray[np.generic]) -> mmap.mmap | None:
    """Find the mapping that a view goes back to, if it is read-only."""
    base: object = array
    while isinstance(base, (np.ndarray, memoryview)):
        base = base.obj if isinstance(base, memoryview) else base.base
    return base if isinstance(base, mmap.mmap) and not array.flags.writeable else None
