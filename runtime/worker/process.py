"""Start and stop a worker in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hecompile.errors import WorkerError
from hecompile.runtime.wire.events import read_event

_STOP_SECONDS = 20


@contextmanager
def worker_process(bundle: Path, engine: str = "auto") -> Iterator[str]:
    """Run a worker in a process of its own on a free loopback port; yields its address. Raises WorkerError if it fails."""
    with running_worker(bundle, ("--engine", engine)) as (_, address):
        yield address


@contextmanager
def running_worker(bundle: Path, options: Sequence[str] = ()) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run `hecompile worker serve` with `options`, by default on a free loopback port; yields the process and its address.

    Raises:
        WorkerError: it ended before it listened; the message has its last words.
    """
    command = [*serve_command(bundle), "--listen", "tcp://127.0.0.1:0", *options]
    with running_server(command) as started:
        yield started


@contextmanager
def running_server(command: Sequence[str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a command of this program that serves and prints events; yields the process and where it listens.

    Raises:
        WorkerError: it ended before it listened; the message has its last words.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:  # a pipe that nobody reads would stop the worker when full
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)  # noqa: S603  this program
        try:
            address = wait_until_listening(process)
            if address is None:
                process.wait(_STOP_SECONDS)
                log.seek(0)
                last = (log.read().strip().splitlines() or ["no message"])[-1]
                raise WorkerError(f"the worker process did not start: {last}")
            yield process, address
        finally:
            stop_process(process)


def serve_command(bundle: Path) -> list[str]:
    """Return the command line that serves `bundle` and prints events (`hecompile.runtime.wire.events`)."""
    return [sys.executable, "-m", "hecompile.cli", "worker", "serve", str(bundle), "--events", "json"]


def wait_until_listening(process: subprocess.Popen[str]) -> str | None:
    """Read the events of a server until it listens; returns its address, or None where its output ends before."""
    assert process.stdout is not None
    for line in process.stdout:
        event = read_event(line)
        if event is not None and event["event"] == "listening":
            return str(event["address"])
    return None


def stop_process(process: subprocess.Popen[str]) -> None:
    """Ask a process to end, wait for it, and end it by force when it does not."""
    process.terminate()
    try:
        process.communicate(timeout=_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
