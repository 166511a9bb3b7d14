"""Make the C library keep memory that was freed, while a model trains.

Glibc maps a block of more than 32 MiB anew at each allocation and gives it back at once when it is freed, so that every
tensor of that size costs a page fault per 4 KiB: at 4096 tokens of width 1024 a sixth of a training step.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

KEPT_BLOCK = 1 << 28
"""Bytes up to which freed blocks stay with the process to be used again."""

KEPT_TOP = 1 << 30
"""Free bytes at the end of the heap from which on some go back to the system."""

_BY_ITSELF = 1 << 25
"""The largest block that glibc comes to keep by itself (and twice as much at the end of the heap)."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_CHOSEN_BY_USER = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


@contextmanager
def freed_memory_kept() -> Iterator[bool]:
    """Reuse freed blocks of up to KEPT_BLOCK bytes in this process (mallopt(3)); what is free at the end goes back.

    Yields whether it does: not where the C library is another or refuses so large a block (glibc before 2.35), nor where
    the environment has settings of the user's own. Threads other than the main one reuse blocks of up to 64 MiB.
    """
    library = _glibc()
    kept = library is not None and _set(library, KEPT_BLOCK, KEPT_TOP)
    try:
        yield kept
    finally:
        if library is not None and kept:
            _set(library, _BY_ITSELF, 2 * _BY_ITSELF)
            library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """Load the C library, if it is glibc and the user has not said how it should allocate."""
    chosen = any(os.environ.get(name) for name in _CHOSEN_BY_USER)
    if chosen or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    try:
        library = ctypes.CDLL(None)
        known = library.gnu_get_libc_version, library.mallopt, library.malloc_trim  # other libraries may lack them
    except (AttributeError, OSError, TypeError):
        return None
    return library if all(known) else None


def _set(library: ctypes.CDLL, block: int, top: int) -> bool:
    return bool(library.mallopt(_MMAP_THRESHOLD, block)) and bool(library.mallopt(_TRIM_THRESHOLD, top))
