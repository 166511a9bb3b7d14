"""Run processes of the benchmarks' own, and wait for the events that they print."""

from __future__ import annotations

import contextlib
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.report import ROOT
from benchmarks.timing import available_bytes
from hecompile.errors import HecompileError
from hecompile.runtime.wire.events import read_event
from hecompile.runtime.worker.process import stop_process

_POLL_SECONDS, _LEAST_MEMORY = 0.25, 2 * 10**9


@contextmanager
def module_process(module: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run `python -m module` with pipes for its input and its output, and end it at the end."""
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    end_first(process.pid)
    try:
        yield process
    finally:
        stop_process(process)


def end_first(pid: int) -> None:
    """Let the system choose this process, and no other, when memory runs out."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000", encoding="utf-8")


def next_event(process: subprocess.Popen[str], name: str) -> dict[str, Any]:
    """Wait for the next line, of which there is never more than one, and return the event `name` in it.

    Raises HecompileError where it holds something else, the process ends, or the machine is about to run out of memory.
    """
    assert process.stdout is not None
    while not select.select([process.stdout], [], [], _POLL_SECONDS)[0]:
        if available_bytes() < _LEAST_MEMORY:
            raise HecompileError(
                f"only {available_bytes() / 1e9:.1f} GB of memory are left: stopped. Free some, or measure a smaller model"
            )
    line = process.stdout.readline()
    if not line:
        raise HecompileError(f"a benchmark process ended early with status {process.wait()}; its messages are above")
    event = read_event(line)
    if event is None or event["event"] != name:
        raise HecompileError(f"a benchmark process printed {line.rstrip()!r} in the place of the event {name!r}")
    return event
