"""Memory that a thread uses again and again: a fresh large array costs a page fault per 4 KiB, as much as what fills it.

What it holds between calls (samples, words on their way to wire bytes) stays inside the client's process, as secrets do.
"""

from __future__ import annotations

import math
import threading
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
