"""Show tables, messages and progress in the same way in every command."""

from __future__ import annotations

import sys

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
