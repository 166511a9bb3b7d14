"""Run `hecompile doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from hecompile.cli.options import wide_console


def doctor(
    worker: Annotated[str, typer.Argument(help="Where the worker listens, as in a recipe.")],
    plan: Annotated[Path, typer.Option(help="The client bundle (build/client) whose plan the worker serves.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens per step to predict for.")] = 512,
    authority: Annotated[Optional[Path], typer.Option(help="PEM of who signed the worker's certificate.")] = None,  # noqa: UP045
    certificate: Annotated[Optional[Path], typer.Option(help="PEM that this client shows.")] = None,  # noqa: UP045
    key: Annotated[Optional[Path], typer.Option(help="PEM of its key.")] = None,  # noqa: UP045
    token: Annotated[Optional[Path], typer.Option(help="A file with the bearer token.")] = None,  # noqa: UP045
) -> None:
    """What to expect of a worker before training with it: protocol, exactness, link speed, predicted seconds per step."""
    from rich.table import Table

    from hecompile.bundles.client import ClientBundle
    from hecompile.inspection.prediction import megabytes
    from hecompile.runtime.client.doctor import diagnose
    from hecompile.runtime.transports import connect_for
    from hecompile.runtime.wire.credentials import ClientCredentials

    bundle = ClientBundle.open(plan)
    credentials = ClientCredentials.load(authority, certificate, key, token)
    console = wide_console()
    pool = connect_for(worker, 1, credentials)
    try:
        with console.status("asking the worker"):
            found = diagnose(bundle, pool, tokens)
    finally:
        pool.close()
    table = Table(title=f"{worker}, plan {bundle.plan_id[:16]}", show_header=False)

    def speed(value: float | None) -> str:
        return "too fast to tell" if value is None else f"{megabytes(round(value))}/s"

    for name, value in (
        ("protocol", f"version {found.protocol}, engine {found.engine}"),
        ("known answers", "exact"),
        ("round trip", f"{1e3 * found.round_trip:.2f} ms"),
        ("link up, down", f"{speed(found.up)}, {speed(found.down)}"),
        (f"a step of {tokens} tokens", f"{megabytes(found.bytes_step)} up and down"),
        ("– worker", f"{found.worker_step:.2f} s"),
        ("– wire", f"{found.wire_step:.2f} s"),
        ("– client cryptography (predicted)", f"{found.client_step:.2f} s"),
        ("together, one after the other", f"{found.step:.2f} s, and the client's own model"),
    ):
        table.add_row(name, value)
    console.print(table)
