"""Run `hecompile inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hecompile.errors import InputError
from hecompile.files import explain_missing
from hecompile.terminal import wide_console

if TYPE_CHECKING:  # imported when a command runs: help is to be quick
    from rich.console import Console


def inspect(
    build: Annotated[
        Path,
        typer.Argument(
            help="The directory given to `export llama --out` or `ckks export --out`, or one half of it; or a checkpoint, "
            "to see what its export would take on disk and in memory; or the .onnx file of a polynomial graph, to see its "
            "depth and refreshes."
        ),
    ],
    draw: Annotated[
        Path | None,
        typer.Option(help="Also draw the plan as a picture, client and worker in two colours (.svg or .png)."),
    ] = None,
    nodes: Annotated[
        bool, typer.Option("--nodes", help="Show the level of every node and every refresh of a polynomial graph too.")
    ] = False,
) -> None:
    """Show what was compiled: per linear its shape, ring, limbs, security, predicted noise and bytes per token; totals.
    For a polynomial graph show its depth and refreshes, under CKKS also parameters and bytes per evaluation."""
    from hecompile.bundles.ckks import is_polynomial_bundle

    if not build.exists():
        raise InputError(f"nothing to inspect at {explain_missing(build)}")
    console = wide_console()
    polynomial = build.is_file() or is_polynomial_bundle(build)
    if polynomial and draw is not None:
        raise InputError(
            "--draw draws the plan of `export llama`, client and worker; a polynomial graph has no such plan"
        )
    if nodes and not polynomial:
        raise InputError(f"--nodes shows a polynomial graph, and {build} has none; give an .onnx file or a CKKS bundle")
    if polynomial:
        _show_polynomial(console, build, nodes)
    elif (build / "config.json").is_file():
        from hecompile.cli.export import predicted_sizes
        from hecompile.compiler.linear import CompileOptions

        console.print(predicted_sizes(str(build), CompileOptions()))
    else:
        _show_plan(console, build, draw)


def _show_polynomial(console: Console, build: Path, nodes: bool) -> None:
    """Print the tables of a polynomial graph: an .onnx file, or a bundle of `hecompile ckks export`."""
    from hecompile.inspection.ckks import bundle_tables
    from hecompile.inspection.polynomial import depth_table, node_table, polynomial_file

    if build.is_file():
        model = polynomial_file(build)
        tables = [depth_table(model), *([node_table(model)] if nodes else [])]
    else:
        tables = bundle_tables(build, nodes)
    for table in tables:
        console.print(table)


def _show_plan(console: Console, build: Path, draw: Path | None) -> None:
    """Print the tables of a build of `hecompile export llama`, or of its client bundle, and draw it."""
    from hecompile.bundles.client import ClientBundle
    from hecompile.inspection.linear import circuit_table, totals_table
    from hecompile.inspection.linear import draw as draw_plan
    from hecompile.inspection.polynomial import approximation_table

    bundle = ClientBundle.open(build / "client" if (build / "client").is_dir() else build)
    console.print(circuit_table(bundle))
    console.print(totals_table(bundle))
    if (approximations := approximation_table(bundle.graph())) is not None:
        console.print(approximations)
    if draw is not None:
        draw_plan(bundle, draw)
        console.print(f"picture: {draw}", soft_wrap=True)
