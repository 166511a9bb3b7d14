"""Run `hecompile demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hecompile.cli.console import wide_console
from hecompile.cli.options import Overrides, Precision


def demo(
    out: Annotated[
        Path, typer.Option(help="Where the build and the runs go; what an earlier demo left is deleted.")
    ] = Path("runs/make-demo"),
    overrides: Overrides = None,
    precision: Precision = 8.0,
) -> None:
    """Run the whole path on the shipped small Llama and private data: export, a worker process on a loopback socket,
    encrypted training, and plaintext training by PEFT beside it for comparison. Takes one to four minutes on two cores."""
    from hecompile.cli.demo_run import run_demo

    run_demo(out, wide_console(), precision, overrides or ())
