"""Run `hecompile inspect`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hecompile.errors import InputError
from hecompile.files import explain_missing
from hecompile.terminal import wide_console

if TYPE_CHECKING:  # imported when a command runs: help is to be quick
    from rich.console import RenderableType

FORMAT = "hecompile-inspect-1"
"""Name of what `--json` prints; a key that goes, or means something else, would change it."""


@dataclass(frozen=True)
class _Wanted:
    """Hold how much is shown."""

    layers: bool
    nodes: bool
    json: bool


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
        typer.Option(
            help="Also draw the plan as a picture, client and worker side by side, each kind of layer once (.svg or .png)."
        ),
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Show a row for every layer instead of ranges over the layers.")
    ] = False,
    nodes: Annotated[
        bool, typer.Option("--nodes", help="Show the level of every node and every refresh of a polynomial graph too.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs, every layer in it.")] = False,
) -> None:
    """Show what was compiled: totals, and per kind of linear its shape, weight bits, precision and bytes per token.
    For a polynomial graph show its depth and refreshes, under CKKS also parameters and bytes per evaluation."""
    from hecompile.bundles.ckks import is_polynomial_bundle
    from hecompile.checkpoint.place import is_gguf

    if not build.exists():
        raise InputError(f"nothing to inspect at {explain_missing(build)}")
    wanted = _Wanted(layers, nodes, as_json)
    is_ckks = is_polynomial_bundle(build)
    is_prediction = is_gguf(build) or (build.is_dir() and not is_ckks and (build / "config.json").is_file())
    is_graph = build.is_file() and not is_prediction
    if draw is not None and (is_graph or is_prediction):
        raise InputError(f"--draw draws a build of `export llama` or `ckks export`, and {build} is none")
    if nodes and not (is_graph or is_ckks):
        raise InputError(f"--nodes shows a polynomial graph, and {build} has none; give an .onnx file or a CKKS bundle")
    if is_graph:
        _show_graph(build, wanted)
    elif is_ckks:
        _show_ckks(build, wanted, draw)
    elif is_prediction:
        _show_prediction(build, wanted)
    else:
        _show_plan(build, wanted, draw)


def _print(
    wanted: _Wanted, tables: Iterable[RenderableType], content: dict[str, Any], picture: Path | None = None
) -> None:
    """Print tables or JSON, and where a picture went."""
    if wanted.json:
        print(json.dumps({"format": FORMAT, **content}, indent=1))
        return
    console = wide_console()
    for table in tables:
        console.print(table)
    if picture is not None:
        console.print(f"picture: {picture}", soft_wrap=True)


def _show_graph(path: Path, wanted: _Wanted) -> None:
    """Show the .onnx file of a polynomial graph."""
    from hecompile.inspection.polynomial import depth_table, graph_json, node_table, polynomial_file

    model = polynomial_file(path)
    tables = [depth_table(model, layers=wanted.layers), *([node_table(model)] if wanted.nodes else [])]
    _print(wanted, tables, {"what": "polynomial graph", **graph_json(model)})


def _show_ckks(build: Path, wanted: _Wanted, draw: Path | None) -> None:
    """Show a bundle of `hecompile ckks export`, or one half of it."""
    from hecompile.inspection.ckks import bundle_json, bundle_tables, open_bundle
    from hecompile.inspection.picture.ckks import draw_ckks

    bundle = open_bundle(build)
    tables = bundle_tables(bundle, wanted.layers, wanted.nodes)
    if draw is not None:
        draw_ckks(bundle, draw)
    _print(wanted, tables, bundle_json(bundle), draw)


def _show_prediction(checkpoint: Path, wanted: _Wanted) -> None:
    """Show what an export of a checkpoint would take."""
    from hecompile.cli.export import predicted_sizes
    from hecompile.compiler.frontend import load_config
    from hecompile.compiler.linear import CompileOptions
    from hecompile.inspection.prediction import ModelSize, prediction_json

    options = CompileOptions()
    if not wanted.json:
        _print(wanted, [predicted_sizes(str(checkpoint), options)], {})
        return
    tokens = options.batch_size * options.sequence_buckets[-1]
    size = ModelSize.of(load_config(str(checkpoint)))
    _print(wanted, [], prediction_json(size, options.weight_bits, tokens))


def _show_plan(build: Path, wanted: _Wanted, draw: Path | None) -> None:
    """Show a build of `hecompile export llama`, or its client bundle."""
    from hecompile.bundles.client import ClientBundle
    from hecompile.inspection.linear import products_of
    from hecompile.inspection.linear_json import plan_json
    from hecompile.inspection.linear_tables import kinds_table, noise_table, products_table, totals_table
    from hecompile.inspection.picture.linear import draw_plan
    from hecompile.inspection.polynomial import approximation_table

    bundle = ClientBundle.open(build / "client" if (build / "client").is_dir() else build)
    products = products_of(bundle)
    rows = [products_table(products), noise_table(products)] if wanted.layers else [kinds_table(products)]
    tables: list[RenderableType] = [totals_table(bundle, products), *rows]
    if (approximations := approximation_table(bundle.graph(), wanted.layers)) is not None:
        tables.append(approximations)
    if draw is not None:
        draw_plan(bundle, products, draw)
    _print(wanted, tables, plan_json(bundle, products), draw)
