"""`hecompile inspect`: what was compiled, of whatever kind it is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from hecompile.errors import InputError


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
        Optional[Path],  # noqa: UP045
        typer.Option(help="Also draw the plan as a picture, client and worker in two colours (.svg or .png)."),
    ] = None,
    nodes: Annotated[
        bool, typer.Option("--nodes", help="Of a polynomial graph, also the level of every node and every refresh.")
    ] = False,
) -> None:
    """Show what was compiled: per linear its shape, ring, limbs, security, predicted noise and bytes per token; totals.
    Of a polynomial graph its depth and refreshes, under CKKS also parameters and bytes per evaluation."""
    from hecompile.bundles.ckks import is_polynomial_bundle
    from hecompile.bundles.client import ClientBundle
    from hecompile.compiler.frontend import load_config
    from hecompile.compiler.linear import CompileOptions
    from hecompile.inspection.linear import circuit_table, totals_table
    from hecompile.inspection.linear import draw as draw_plan
    from hecompile.inspection.polynomial import approximation_table, depth_table, node_table, polynomial_file
    from hecompile.inspection.prediction import ModelSize, prediction_table

    console = Console(width=None if sys.stdout.isatty() else 160)
    polynomial = build.is_file() or is_polynomial_bundle(build)
    if polynomial and draw is not None:
        raise InputError(
            "--draw draws the plan of `export llama`, client and worker; a polynomial graph has no such plan"
        )
    if nodes and not polynomial:
        raise InputError(f"--nodes shows a polynomial graph, and {build} has none; give an .onnx file or a CKKS bundle")
    if build.is_file():
        model = polynomial_file(build)
        console.print(depth_table(model))
        if nodes:
            console.print(node_table(model))
        return
    if polynomial:
        from hecompile.inspection.ckks import bundle_tables

        for table in bundle_tables(build, nodes):
            console.print(table)
        return
    if (build / "config.json").is_file():
        defaults = CompileOptions()
        tokens = defaults.batch_size * defaults.sequence_buckets[-1]
        console.print(prediction_table(ModelSize.of(load_config(str(build))), defaults.weight_bits, tokens))
        return
    bundle = ClientBundle.open(build / "client" if (build / "client").is_dir() else build)
    console.print(circuit_table(bundle))
    console.print(totals_table(bundle))
    if (approximations := approximation_table(bundle.graph())) is not None:
        console.print(approximations)
    if draw is not None:
        draw_plan(bundle, draw)
        console.print(f"picture: {draw}", soft_wrap=True)
