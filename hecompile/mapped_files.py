"""Map files into memory read-only, without keeping them open.

`mmap.mmap` and NumPy keep a descriptor for as long as a mapping lives, which the mapping does not need (mmap(2)): a model of
80 layers would hold more than the usual 1024. Python can leave it out from 3.13 on.
"""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np

_PROT_READ, _MAP_PRIVATE, _FAILED = 1, 2, ctypes.c_void_p(-1).value
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Mapping:
    """Hold a mapped part of a file; unmapped when no array refers to it any more.

    Args:
        path: the file. It must keep its length for as long as the mapping lives.
        start, count: the bytes that are mapped.

    Raises:
        ValueError: the file has fewer bytes.
        OSError: as files do.
    """

    def __init__(self, path: Path, start: int, count: int) -> None:
        before = start % mmap.ALLOCATIONGRANULARITY  # a mapping begins at a page
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if start < 0 or count < 1 or start + count > size:
                raise ValueError(f"it has {size} bytes; {start + count} are needed")
            page = _LIBC.mmap(None, before + count, _PROT_READ, _MAP_PRIVATE, file.fileno(), start - before)
        if page == _FAILED:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self._page, self._length = page, before + count
        interface = {"version": 3, "typestr": "|u1", "shape": (count,), "data": (page + before, True)}
        self.__array_interface__: dict[str, Any] = interface
        # Not at the end of the process, where threads may still read; the system unmaps then.
        weakref.finalize(self, _LIBC.munmap, page, before + count).atexit = False

    def array(self, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
        """Return the bytes as a read-only array, which keeps the mapping alive."""
        return np.asarray(self).view(dtype).reshape(shape)

    def madvise(self, advice: int, address: int | None = None, count: int = 0) -> None:
        """Give the system advice (`mmap.MADV_DONTNEED` and its like) on the pages of some addresses, or on all."""
        first = self._page if address is None else address // mmap.PAGESIZE * mmap.PAGESIZE
        length = self._length if address is None else address + count - first
        if _LIBC.madvise(first, length, advice) != 0 and (number := ctypes.get_errno()) != errno.EAGAIN:
            raise OSError(number, os.strerror(number))


def map_array(path: Path, dtype: Any, shape: tuple[int, ...], start: int = 0) -> np.ndarray:
    """Map an array of a file, in C order from byte `start`, read-only. Raises ValueError and OSError as `Mapping` does."""
    return Mapping(path, start, math.prod(shape) * np.dtype(dtype).itemsize).array(dtype, shape)


def mapping_of(array: np.ndarray) -> Mapping | None:
    """Return the mapping that an array lies in; None for one that lies in other memory."""
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, Mapping) else None
