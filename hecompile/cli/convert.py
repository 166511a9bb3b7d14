"""`hecompile convert`: continued training of a checkpoint towards polynomials."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer


def convert(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, such as models/recipes/convert-reduced.yaml.")],
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="Settings in place of the recipe's, as in training.steps=100."),
    ] = None,
) -> None:
    """Train a checkpoint on public text for polynomial attention, normalisation and activation, with a loss that keeps their
    inputs in range. `export llama` then finds the polynomials in its config.json. An interrupted conversion goes on when the
    same command is run again."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from hecompile.runtime.conversion.recipe import load_conversion
    from hecompile.runtime.conversion.train import convert as run

    found = load_conversion(recipe, overrides or [])
    console = Console(stderr=True)
    quiet = found.training.disable_tqdm or not sys.stderr.isatty()
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=quiet) as bar:
        tasks = {}

        def show(stage: str, done: int, steps: int, loss: float) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=steps, loss=loss)
            bar.update(tasks[stage], completed=done, loss=loss)

        result = run(found, show)
    console.print(
        f"{escape(str(found.out))}: held-out loss {result.heldout_loss_before:.3f} before, {result.heldout_loss:.3f} after; "
        "ranges and domains in conversion_report.json",
        soft_wrap=True,
    )
