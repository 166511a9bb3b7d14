"""Give memory that is free again back to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_M_MMAP_THRESHOLD = -3
"""A constant of glibc's malloc.h."""
_LARGE, _USUAL = 2**20, 2**25
"""Bytes; the second is what glibc settles at by itself after a large array."""


@contextmanager
def large_arrays_apart() -> Iterator[None]:
    """Give every array of a megabyte pages of its own, which go back when it is freed; do nothing without glibc.

    By itself glibc puts arrays of up to 32 megabytes into its heap, where the gaps between them stay: a process that makes
    and frees many comes to hold several times what is in use.
    """
    setting: Any = getattr(ctypes.CDLL(None), "mallopt", None)
    if setting is None:
        yield
        return
    setting(_M_MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        setting(_M_MMAP_THRESHOLD, _USUAL)
