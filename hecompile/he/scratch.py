"""Memory that a thread uses again and again: a fresh large array costs a page fault per 4 KiB, as much as what fills it.

What it holds between calls (samples, words on their way to wire bytes) stays inside the client's process, as secrets do.
"""

from __future__ import annotations

import math
import threading
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


def result_of(shape: tuple[int, ...], dtype: type[np.generic]) -> Tensor:
    """An uninitialized tensor for what is handed out, from a cache line on: the kernels write whole lines.

    numpy asks for huge pages where it is large: fewer faults.
    """
    return torch.from_numpy(aligned(math.prod(shape), dtype).reshape(shape))


@cache
def second_level_cache() -> int:
    """Bytes of it that a core has: as Linux tells, or 2^20 where it does not, which is a common size."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text(encoding="ascii").strip()
        return 1024 * int(text.removesuffix("K"))
    except (OSError, ValueError):
        return 2**20
