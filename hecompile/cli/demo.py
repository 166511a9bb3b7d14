"""Run `hecompile demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from hecompile.cli.options import wide_console


def demo(
    out: Annotated[Path, typer.Option(help="Where the build, the runs and the report go; emptied first.")] = Path(
        "runs/make-demo"
    ),
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="Changes to models/recipes/demo.yaml for both runs, e.g. training.max_steps=20"),
    ] = None,
    precision: Annotated[float, typer.Option(help="As for `export llama`.")] = 8.0,
) -> None:
    """The whole path on the shipped small Llama and private data: export, a worker process on a loopback socket, encrypted
    training, and the same by plaintext PEFT for comparison. One to four minutes on two cores."""
    from hecompile.cli.demo_run import run_demo

    run_demo(out, wide_console(), precision, overrides or ())
