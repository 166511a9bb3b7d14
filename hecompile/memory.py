"""What the C library does with memory that was freed, while a model trains.

Glibc maps a block of more than 32 MiB anew at each allocation and gives it back at once when it is freed, so that every
tensor of that size costs a page fault per 4 KiB: a sixth of a training step where batches are large.
"""

from __future__ import annotations

import ctypes
import os

KEPT_BLOCK = 1 << 28
"""Bytes up to which freed blocks stay with the process to be used again."""

KEPT_TOP = 1 << 30
"""Free bytes at the end of the heap from which on some go back to the system."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_CHOSEN_BY_USER = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def keep_freed_memory() -> bool:
    """Makes the allocator of this process reuse blocks of up to KEPT_BLOCK bytes (mallopt(3)), from now on.

    Returns whether it does: not where the C library is another, nor where the environment has settings of the user's own.
    """
    if any(name in os.environ for name in _CHOSEN_BY_USER):
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  other libraries number these options otherwise, or have none
        mallopt = library.mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(mallopt(option, value) for option, value in ((_MMAP_THRESHOLD, KEPT_BLOCK), (_TRIM_THRESHOLD, KEPT_TOP)))
