"""Share work out over as many threads as torch uses, so that `torch.set_num_threads` governs both."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch

Part = TypeVar("Part")


def for_each(work: Callable[[Part], None], parts: Sequence[Part]) -> None:
    """Call `work` for every part, in any order, on several threads, and return when all are done.

    An exception in one part is raised here. A call from within such work does all parts itself: threads that wait for each
    other's free places would wait for ever.
    """
    threads = 1 if getattr(_LOCAL, "working", False) else min(torch.get_num_threads(), len(parts))
    if threads <= 1:
        for part in parts:
            work(part)
        return
    remaining, lock, todo = iter(parts), threading.Lock(), [work]

    def share() -> None:
        while True:
            with lock:
                part = next(remaining, None)
            if part is None:
                return
            todo[0](part)

    # The caller works too: waking a thread takes as long as a small part, and one that comes late finds nothing left.
    helpers = [_pool(torch.get_num_threads()).submit(share) for _ in range(threads - 1)]
    try:
        share()
    finally:
        try:
            with lock:
                remaining = iter(())  # after an exception the others stop as well
            for helper in helpers:
                if not helper.cancel():
                    helper.result()
        finally:
            todo.clear()  # a late thread lets go of `share` late, and would hold on to all that `work` refers to


def slices(total: int, step: int) -> list[slice]:
    """Cut [0, total) into pieces of `step`, the last one perhaps shorter."""
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]


@lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, threads - 1), thread_name_prefix="hecompile-share", initializer=_mark_as_worker)


_LOCAL = threading.local()


def _mark_as_worker() -> None:
    _LOCAL.working = True
