"""Memory that a thread uses again and again: a fresh large array costs a page fault per 4 KiB, as much as what fills it.

What it holds between calls (samples, words on their way to wire bytes) stays inside the client's process, as secrets do.
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
    """An uninitialized flat array of this thread, aligned to a cache line; the next call with `name` overwrites it."""
    arrays: dict[str, NDArray[Any]] = _LOCAL.__dict__.setdefault("arrays", {})
    array = arrays.get(name)
    if array is None or array.size < count or array.dtype != dtype:
        array = arrays[name] = aligned(count, dtype)
    return array[:count]


_KEPT_FROM = 1 << 25
"""Bytes from which on glibc gives memory back to the system whenever it is freed, but in training
(`hecompile.runtime.training.freed_memory`)."""

_KEPT_IN_ALL = 1 << 28
"""Most bytes of such results that are kept track of, in use or not."""

_results: list[tuple[NDArray[Any], weakref.ref[NDArray[Any]]]] = []  # memory, and what was handed out of it; oldest first
_lock = threading.RLock()


def result_of(shape: tuple[int, ...], dtype: type[np.generic]) -> Tensor:
    """An uninitialized tensor for what is handed out, from a cache line on: the kernels write whole lines.

    Where it is large its memory may be that of an earlier result of the same type that nothing refers to any more; what
    goes to a worker and what was decrypted are of different types.
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
            # Looked at when memory is wanted, and no callback: one would run in the midst of whatever lets a tensor go.
            _results.append((memory, weakref.ref(handed_out)))
    return torch.from_numpy(handed_out)


def _reclaim(size: int, dtype: np.dtype[Any]) -> NDArray[Any] | None:
    """Memory that fits. Where there is none, as much of what is free is let go as makes room for that many bytes."""
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
    """Bytes of it that a core has: as Linux tells, or 2^20 where it does not, which is a common size."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text(encoding="ascii").strip()
        return 1024 * int(text.removesuffix("K"))
    except (OSError, ValueError):
        return 2**20
