"""Hold what several commands share: the console, progress columns, options of the same name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn

# typer evaluates annotations, so that `Path | None` would not do here.
Authority = Annotated[Optional[Path], typer.Option(help="PEM of who signed the worker's certificate.")]  # noqa: UP045
Certificate = Annotated[Optional[Path], typer.Option(help="PEM that this client shows.")]  # noqa: UP045
Key = Annotated[Optional[Path], typer.Option(help="PEM of its key.")]  # noqa: UP045
Token = Annotated[Optional[Path], typer.Option(help="A file with the bearer token.")]  # noqa: UP045


def wide_console() -> Console:
    """Return a console on standard output: as wide as the terminal, 160 columns where there is none."""
    return Console(width=None if sys.stdout.isatty() else 160)


def progress_columns() -> tuple[ProgressColumn, ...]:
    """Return the columns of a bar that counts known steps: spinner, description, bar, count, elapsed time."""
    return (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
