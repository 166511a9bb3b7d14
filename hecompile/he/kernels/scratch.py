"""Keep memory for reuse: a fresh large array costs a page fault per 4 KiB, as much as filling it.

The contents between calls (samples, words on their way to wire bytes) stay inside the client's process, as secrets do.
"""

from __future__ import annotations

import math
import threading
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hecompile.he.kernels.transform import aligned

_LOCAL = threading.local()


def scratch(name: str, count: int, dtype: type[np.generic]) -> NDArray[Any]:
    """Return an uninitialized flat array of this thread, aligned to a cache line.

    The next call with the same `name` in this thread returns the same memory.
    """
    arrays: dict[str, NDArray[Any]] = _LOCAL.__dict__.setdefault("arrays", {})
    array = arrays.get(name)
    if array is None or array.size < count or array.dtype != dtype:
        array = arrays[name] = aligned(count, dtype)
    return array[:count]


_KEPT_FROM = 1 << 25
"""Bytes from which on glibc gives memory back to the system whenever it is freed, except in training
(`hecompile.runtime.training.freed_memory`)."""

_KEPT_IN_ALL = 1 << 28
"""Most bytes of such results that are kept track of, in use or not."""

_results: list[tuple[NDArray[Any], weakref.ref[NDArray[Any]]]] = []  # memory, and what was handed out of it; oldest first
_lock = threading.RLock()


def result_of(shape: tuple[int, ...], dtype: type[np.generic]) -> Tensor:
    """Return an uninitialized tensor for a result that is handed out, aligned to a cache line for the kernels.

    A large one may reuse the memory of an earlier result of the same type that nothing refers to any more. What goes to a
    worker and what was decrypted have different types, so neither ever gets the other's memory.
    """
    count = math.prod(shape)
    size = count * np.dtype(dtype).itemsize
    if not _KEPT_FROM <= size <= _KEPT_IN_ALL:
        return torch.from_numpy(aligned(count, dtype).reshape(shape))
    with _lock:
        memory = _reclaim(size, np.dtype(dtype))
        memory = aligned(count, dtype) if memory is None else memory
        handed_out = memory[:count].reshape(shape)  # the tensor, and whatever shares its storage, holds this very array
        if sum(each.nbytes for each, _ in _results) + memory.nbytes <= _KEPT_IN_ALL:
            # Examined when memory is wanted, not by a callback, which would run in the midst of whatever lets a tensor go.
            _results.append((memory, weakref.ref(handed_out)))
    return torch.from_numpy(handed_out)


def _reclaim(size: int, dtype: np.dtype[Any]) -> NDArray[Any] | None:
    """Take the memory of a result that is gone, at most twice as large as wanted; None where there is none.

    In that case enough free memory is released to make room for `size` bytes.
    """
    for index, (memory, result) in enumerate(_results):
        if result() is None and memory.dtype == dtype and size <= memory.nbytes <= 2 * size:
            del _results[index]
            return memory
    over = sum(memory.nbytes for memory, _ in _results) + size - _KEPT_IN_ALL
    for memory, result in list(_results):
        if over > 0 and result() is None:
            over -= memory.nbytes
            _results[:] = [each for each in _results if each[0] is not memory]
    return None


@cache
def second_level_cache() -> int:
    """Return the bytes of a core's second-level cache, by Linux, or 2^20, a common size, where it does not tell."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text(encoding="ascii").strip()
        return 1024 * int(text.removesuffix("K"))
    except (OSError, ValueError):
        return 2**20
