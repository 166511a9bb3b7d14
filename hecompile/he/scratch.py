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

from hecompile.he.kernels import aligned

_LOCAL = threading.local()


def scratch(name: str, count: int, dtype: type[np.generic]) -> NDArray[Any]:
    """An uninitialized flat array of this thread, aligned to a cache line; the next call with `name` overwrites it."""
    arrays: dict[str, NDArray[Any]] = _LOCAL.__dict__.setdefault("arrays", {})
    found = arrays.get(name)
    if found is None or found.size < count or found.dtype != dtype:
        found = arrays[name] = aligned(count, dtype)
    return found[:count]


_KEPT_FROM = 1 << 25
"""Bytes from which on glibc gives memory back to the system whenever it is freed: page faults at every call."""

_KEPT_IN_ALL = 1 << 28
"""Most bytes kept of tensors that were let go."""

_kept: dict[int, NDArray[Any]] = {}  # by address, the oldest first; each change is one atomic operation


def result_of(shape: tuple[int, ...], dtype: type[np.generic]) -> Tensor:
    """An uninitialized tensor for what is handed out, from a cache line on: the kernels write whole lines.

    Where it is large its memory may be that of an earlier result of the same type that nothing refers to any more; what
    goes to a worker and what was decrypted are of different types.
    """
    count = math.prod(shape)
    size = count * np.dtype(dtype).itemsize
    if size < _KEPT_FROM:
        return torch.from_numpy(aligned(count, dtype).reshape(shape))
    memory = _taken(size, np.dtype(dtype))
    memory = aligned(count, dtype) if memory is None else memory
    handed_out = memory[:count].reshape(shape)
    # The tensor, and whatever shares its storage, holds this very array.
    weakref.finalize(handed_out, _keep, memory).atexit = False
    return torch.from_numpy(handed_out)


def _taken(size: int, dtype: np.dtype[Any]) -> NDArray[Any] | None:
    for address, memory in list(_kept.items()):
        if memory.dtype == dtype and size <= memory.nbytes <= 2 * size and _kept.pop(address, None) is not None:
            return memory
    return None


def _keep(memory: NDArray[Any]) -> None:
    """Called when the last reference to a result is gone, in whichever thread that is."""
    _kept[memory.__array_interface__["data"][0]] = memory
    while sum(each.nbytes for each in list(_kept.values())) > _KEPT_IN_ALL:
        _kept.pop(next(iter(list(_kept)), 0), None)


@cache
def second_level_cache() -> int:
    """Bytes of it that a core has: as Linux tells, or 2^20 where it does not, which is a common size."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text(encoding="ascii").strip()
        return 1024 * int(text.removesuffix("K"))
    except (OSError, ValueError):
        return 2**20
