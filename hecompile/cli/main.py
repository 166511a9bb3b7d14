"""Register the commands and run the command line.

Each command has a file of its own. It checks its options, calls the library and prints the result.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from hecompile import __version__
from hecompile.cli.ckks import ckks_app
from hecompile.cli.convert import convert
from hecompile.cli.demo import demo
from hecompile.cli.doctor import doctor
from hecompile.cli.export import export_llama, export_model
from hecompile.cli.federate import federate, federation_app
from hecompile.cli.groups import ANY_MODEL, ModelOrCommand
from hecompile.cli.infer import infer
from hecompile.cli.inspect import inspect
from hecompile.cli.output import prepare_output
from hecompile.cli.privacy import privacy
from hecompile.cli.train import train
from hecompile.cli.worker import worker_app
from hecompile.errors import HecompileError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Compile an open-weight model so that you can LoRA-fine-tune it on private text while an untrusted worker does "
    "the heavy multiplications on ciphertexts only.\n\nThe usual order: `export MODEL`, `inspect`, `worker serve` (on the "
    "worker's machine), `train` (on yours).",
)
export_app = typer.Typer(
    cls=ModelOrCommand,
    no_args_is_help=True,
    help="Compile a checkpoint into a client bundle and a worker bundle: `hecompile export MODEL --out BUILD`, MODEL a "
    "directory or a hub id.",
)
export_app.command(ANY_MODEL)(export_model)
export_app.command("llama")(export_llama)
app.add_typer(export_app, name="export")
app.add_typer(worker_app, name="worker")
app.add_typer(federation_app, name="federation")
app.command()(train)
app.command()(doctor)
app.command()(demo)
app.command()(federate)
app.add_typer(ckks_app, name="ckks")
app.command()(convert)
app.command()(inspect)
app.command()(infer)
app.command()(privacy)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"hecompile {__version__}")
        raise typer.Exit


@app.callback()
def _before_any_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Take the options that stand before a command; the help text is that of `app`."""


def main() -> None:
    """Run the command line and exit with its status.

    Bad input is one line on standard error and status 2, an interrupt is status 130.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Client and worker may share the cores: a thread that spins while it waits would take them from the other side.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    prepare_output()
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except HecompileError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as ended:
        # typer makes status 130 of an interrupt. What a command raised it with says how to go on.
        stopped = ended.__context__ and ended.__context__.__cause__
        if isinstance(stopped, KeyboardInterrupt):
            print("; ".join(["interrupted", *map(str, stopped.args)]), file=sys.stderr)
        raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
