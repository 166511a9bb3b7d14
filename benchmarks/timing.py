"""Time functions by medians of interleaved runs in one process: a slow spell of the machine slows all of them alike."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numba
import psutil
import torch

_NUMBA_THREADS = numba.get_num_threads()  # at the start, as many as there can be


@dataclass
class Samples:
    """Hold wall and CPU seconds of the calls of one function; CPU seconds are those of all threads of the process."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Return the median wall seconds of a call."""
        return statistics.median(self.wall)

    @property
    def cpu_seconds(self) -> float:
        """Return the median CPU seconds of a call."""
        return statistics.median(self.cpu)


def paired(
    functions: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1, budget_seconds: float = 120.0
) -> dict[str, Samples]:
    """Call the functions in turn, `repeats` rounds after `warmup` uncounted ones: round 1 of all, round 2 of all, ...

    The order alternates from round to round, so that none always runs in another's warm cache. At least three rounds are
    taken (fewer if `repeats` says so) and no further one is begun after `budget_seconds`.
    """
    for _ in range(warmup):
        for function in functions.values():
            function()
    samples = {name: Samples() for name in functions}
    started = time.perf_counter()
    for round_number in range(repeats):
        if round_number >= 3 and time.perf_counter() - started > budget_seconds:
            break
        names = list(functions)[:: 1 if round_number % 2 == 0 else -1]
        for name in names:
            cpu, wall = time.process_time(), time.perf_counter()
            functions[name]()
            samples[name].wall.append(time.perf_counter() - wall)
            samples[name].cpu.append(time.process_time() - cpu)
    return samples


def ratio(own: list[float], reference: list[float]) -> float:
    """Return the median over the rounds of own / reference: each round is one pair."""
    return statistics.median(a / b for a, b in zip(own, reference, strict=True))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run torch and numba on `count` threads (numba cannot have more than it started with)."""
    before = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(count)
    numba.set_num_threads(min(count, _NUMBA_THREADS))
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        numba.set_num_threads(before[1])


def thread_counts() -> list[int]:
    """Return 1, and as many as there are cores for this process."""
    cores = len(os.sched_getaffinity(0))
    return [1] if cores == 1 else [1, cores]


def describe_threads() -> str:
    """Describe how this process is pinned and threaded, for the header of a page."""
    cores = sorted(os.sched_getaffinity(0))
    policy = os.environ.get("OMP_WAIT_POLICY", "unset")
    return (
        f"cores {','.join(map(str, cores))}, torch {torch.get_num_threads()} threads, "
        f"numba {numba.get_num_threads()} threads, OMP_WAIT_POLICY {policy}"
    )


def resident_bytes(pid: int | str = "self") -> tuple[int, int]:
    """Return the (present, peak) resident set of a process in bytes: VmRSS and VmHWM of /proc."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    values = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return 1024 * int(values["VmRSS"]), 1024 * int(values["VmHWM"])


def cpu_seconds(pid: int) -> float:
    """Return the user and system CPU seconds of another process so far."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def available_bytes() -> int:
    """Return the memory that the machine can still give, in bytes."""
    return int(psutil.virtual_memory().available)
