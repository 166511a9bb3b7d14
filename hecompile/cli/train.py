"""Run `hecompile train`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from hecompile.cli.options import ON_BAD_WORKER, Overrides, TrainingRecipePath
from hecompile.errors import WorkerError
from hecompile.terminal import counted, shown_path, wide_console


def train(
    recipe: TrainingRecipePath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in training.output_dir.")] = False,
    on_bad_worker: Annotated[str | None, typer.Option(help=f"{ON_BAD_WORKER} By default the recipe decides.")] = None,
) -> None:
    """Fine-tune by LoRA with encrypted products; write checkpoints, metrics.jsonl and the adapter in PEFT's format."""
    from transformers.trainer_utils import get_last_checkpoint

    from hecompile.runtime.client.session import open_session
    from hecompile.runtime.recipes.training import load_recipe
    from hecompile.runtime.training.train import run_training

    policy = [] if on_bad_worker is None else [f"connection.on_bad_worker={on_bad_worker}"]
    loaded = load_recipe(recipe, [*(overrides or ()), *policy])
    output_dir, started = loaded.training.output_dir, time.time()
    with open_session(loaded) as session:
        try:
            result = run_training(session.model, session.tokenizer, loaded, resume=resume)
        except (KeyboardInterrupt, WorkerError) as error:
            last = get_last_checkpoint(str(output_dir)) if output_dir.is_dir() else None
            if last is None or not (resume or Path(last).stat().st_mtime >= started):  # none, or one of an earlier run
                raise
            on = f"the same command with --resume goes on from {Path(last).name}"
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(on) from None
            raise type(error)(f"{str(error).rstrip('.')}. The steps up to there are kept: {on}") from None
    console = wide_console()
    figures = "".join(f", {name} {value:.4f}" for name, value in result.metrics.items())
    steps, adapter = counted(result.steps, "step"), shown_path(result.adapter_dir)
    console.print(f"{steps}{figures}\nadapter: {adapter}", soft_wrap=True)
    if result.privacy is not None:
        console.print(result.privacy, soft_wrap=True)
