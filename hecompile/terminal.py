"""Show tables, messages and progress in the same way everywhere."""

from __future__ import annotations

import sys
from pathlib import Path

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


def wide_console() -> Console:
    """Return a console on standard output: as wide as the terminal, 160 columns where there is none."""
    return Console(width=None if sys.stdout.isatty() else 160)


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
