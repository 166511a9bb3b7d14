"""Start and stop a worker in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hecompile.errors import WorkerError

_STOP_SECONDS = 20
_LISTENING = "listening on "


@contextmanager
def worker_process(bundle: Path, engine: str = "auto") -> Iterator[str]:
    """A worker in a process of its own on a free loopback port; yields its address. Raises WorkerError if it fails."""
    command = [sys.executable, "-m", "hecompile.cli", "worker", "serve", str(bundle)]
    command += ["--listen", "tcp://127.0.0.1:0", "--engine", engine]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # noqa: S603
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith(_LISTENING):
            _, errors = process.communicate(timeout=_STOP_SECONDS)
            last = (errors.strip().splitlines() or ["no message"])[-1]
            raise WorkerError(f"the worker process did not start: {last}")
        yield line.removeprefix(_LISTENING).strip()
    finally:
        stop_process(process)


def stop_process(process: subprocess.Popen[str]) -> None:
    """Ask it to end, wait, and end it by force when it does not."""
    process.terminate()
    try:
        process.communicate(timeout=_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
