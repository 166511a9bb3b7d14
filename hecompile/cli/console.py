"""Show tables, messages and progress in the same way in every command."""

from __future__ import annotations

import sys
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from hecompile.errors import InputError
from hecompile.runtime.wire.events import emit


def wide_console() -> Console:
    """Return a console on standard output: as wide as the terminal, 160 columns where there is none."""
    return Console(width=None if sys.stdout.isatty() else 160)


EVENTS = typer.Option(help="What is printed for people, text, or for the program that started it, json.")


def tell_address(events: str, address: str) -> None:
    """Say on standard output where a server listens: a sentence, or an event. Raises InputError for unknown `events`."""
    check_events(events)
    if events == "json":
        emit("listening", address=address)
    else:
        print(f"listening on {address}", flush=True)


def check_events(events: str) -> None:
    """Raise InputError unless `events` is text or json."""
    if events not in ("text", "json"):
        raise InputError(f"--events is text or json, got {events!r}")


def message_console() -> Console:
    """Return a console on standard error, for what is not the result of a command."""
    return Console(stderr=True)


def shown_path(path: Path) -> Path:
    """Return a path as it is printed: without `..` on the way, from the working directory where it lies in that."""
    whole, here = path.resolve(), Path.cwd().resolve()
    return whole.relative_to(here) if whole.is_relative_to(here) else whole


def counted(number: int, what: str) -> str:
    """Return a number with what is counted, as in 1 step and 2 steps."""
    return f"{number} {what}" + ("" if number == 1 else "s")


def progress_bar(console: Console, *columns: ProgressColumn, quiet: bool = False) -> Progress:
    """Return a bar that counts known steps: spinner, description, bar, count, elapsed time, then `columns`.

    With `quiet` nothing is shown.
    """
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        *columns,
        console=console,
        disable=quiet,
    )
