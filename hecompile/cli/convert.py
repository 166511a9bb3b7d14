"""Run `hecompile convert`."""

from __future__ import annotations

import sys

from hecompile.cli.options import ConversionRecipePath, Overrides
from hecompile.terminal import message_console, progress_bar, shown_path


def convert(recipe: ConversionRecipePath, overrides: Overrides = None) -> None:
    """Train a checkpoint on public text for polynomial attention, normalisation and activation, with a loss that keeps their
    inputs in range. `export llama` then finds the polynomials in its config.json. An interrupted conversion goes on when the
    same command is run again."""
    from rich.markup import escape
    from rich.progress import TextColumn, TimeRemainingColumn

    from hecompile.runtime.conversion.recipe import load_conversion
    from hecompile.runtime.conversion.train import convert as run

    loaded = load_conversion(recipe, overrides or [])
    console = message_console()
    quiet = loaded.training.disable_tqdm or not sys.stderr.isatty()
    columns = (TimeRemainingColumn(), TextColumn("loss {task.fields[loss]:.3f}"))
    with progress_bar(console, *columns, quiet=quiet) as bar:
        tasks = {}

        def show(stage: str, done: int, steps: int, loss: float) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=steps, loss=loss)
            bar.update(tasks[stage], completed=done, loss=loss)

        result = run(loaded, show)
    console.print(
        f"{escape(str(shown_path(loaded.out)))}: held-out loss {result.heldout_loss_before:.3f} before, "
        f"{result.heldout_loss:.3f} after; ranges and domains in conversion_report.json",
        soft_wrap=True,
    )
