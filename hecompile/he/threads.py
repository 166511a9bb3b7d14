"""Work shared out over threads: as many as torch uses, so that one setting (`torch.set_num_threads`) governs both."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch

Part = TypeVar("Part")


def for_each(work: Callable[[Part], None], parts: Sequence[Part]) -> None:
    """Calls `work` for every part, in any order, on several threads; returns when all are done.

    An exception in one part is raised here. Called from within such work it does all parts itself: threads that wait for
    each other's free places would wait for ever.
    """
    threads = 1 if getattr(_LOCAL, "working", False) else min(torch.get_num_threads(), len(parts))
    if threads <= 1:
        for part in parts:
            work(part)
        return
    for _ in _pool(torch.get_num_threads()).map(work, parts):
        pass


def slices(total: int, step: int) -> list[slice]:
    """[0, total) in pieces of `step`, the last one perhaps shorter."""
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]


@lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="hecompile-share", initializer=_mark)


_LOCAL = threading.local()


def _mark() -> None:
    _LOCAL.working = True
