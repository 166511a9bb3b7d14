"""`hecompile federate` runs a federation on this machine; `hecompile federation` has its parts, one process each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

federation_app = typer.Typer(no_args_is_help=True, help="The processes of a federation, on one machine.")

_Recipe = Annotated[Path, typer.Argument(help="YAML recipe; models/recipes/federation.yaml is a commented example.")]
_Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045  typer evaluates it
    typer.Argument(help="Changes to the recipe, e.g. federation.rounds=3 training.max_steps=5"),
]


def federate(
    recipe: _Recipe,
    overrides: _Overrides = None,
    compare: Annotated[
        bool,
        typer.Option(
            help="Also train each owner alone, and all with updates averaged in the clear, and show all three."
        ),
    ] = True,
) -> None:
    """Train one adapter from several owners' private data: a server process and one per owner over loopback sockets. The
    server adds encrypted updates and learns their sum alone."""
    import transformers
    from rich.console import Console

    from hecompile.runtime.federation.launch import read_adapter, run_processes
    from hecompile.runtime.federation.recipe import load_federation
    from hecompile.runtime.federation.report import accuracy_table, bytes_line

    transformers.utils.logging.disable_progress_bar()
    console = Console()
    loaded = load_federation(recipe, overrides or ())
    agreement = loaded.agreement()
    console.print(
        f"{len(loaded.owners)} owners, {agreement.section.rounds} rounds; {agreement.threshold} open a sum, at least "
        f"{agreement.minimum} are in it; {agreement.parameters().security_bits:.0f} bits",
        soft_wrap=True,
    )
    records = run_processes(recipe, overrides or (), lambda line: console.print(line, soft_wrap=True))
    console.print(bytes_line(records), soft_wrap=True)
    adapters = {"federated, encrypted" + (" and pruned" if agreement.section.pruning else ""): read_adapter(loaded)}
    console.print(accuracy_table(loaded, adapters, compare, lambda line: console.print(line, soft_wrap=True)))
    console.print(f"PEFT adapter: {loaded.training.output_dir / 'adapter'}", soft_wrap=True)


@federation_app.command("serve")
def serve_command(
    recipe: _Recipe,
    roster: Annotated[Path, typer.Option(help="JSON of the owners' names and public keys.")],
    overrides: _Overrides = None,
    port: Annotated[int, typer.Option(help="On the loopback address; 0 picks a free one.")] = 7800,
) -> None:
    """The server: it waits for all owners of the recipe, then runs its rounds."""
    import transformers

    from hecompile.runtime.federation.launch import read_roster, serve
    from hecompile.runtime.federation.recipe import load_federation

    transformers.utils.logging.disable_progress_bar()
    directory = serve(
        load_federation(recipe, overrides or ()), read_roster(roster), port, lambda line: print(line, flush=True)
    )
    print(f"adapter: {directory}", flush=True)


@federation_app.command("join")
def join_command(
    recipe: _Recipe,
    owner: Annotated[str, typer.Option(help="Which owner of the recipe this is.")],
    roster: Annotated[Path, typer.Option(help="JSON of the owners' names and public keys.")],
    keys: Annotated[Path, typer.Option(help="This owner's private folder; identity.key is made there if it has none.")],
    overrides: _Overrides = None,
    server: Annotated[str, typer.Option(help="Where `federation serve` listens.")] = "tcp://127.0.0.1:7800",
) -> None:
    """An owner: it trains on its own data and sends encrypted updates until the federation is over."""
    import transformers

    from hecompile.runtime.federation.launch import join, read_roster
    from hecompile.runtime.federation.recipe import load_federation

    transformers.utils.logging.disable_progress_bar()
    directory = join(load_federation(recipe, overrides or ()), owner, read_roster(roster), keys, server)
    print(f"adapter: {directory}", flush=True)


@federation_app.command("identities")
def identities_command(
    recipe: _Recipe,
    keys: Annotated[Path, typer.Option(help="Gets a private folder with identity.key for every owner.")],
    roster: Annotated[Path, typer.Option(help="Where to write the roster.")],
) -> None:
    """Identities of all owners of a recipe and their roster, for trying a federation out on one machine."""
    from hecompile.runtime.federation.launch import write_roster
    from hecompile.runtime.federation.protocol.channels import Identity
    from hecompile.runtime.federation.recipe import load_federation

    names = load_federation(recipe).names
    write_roster(roster, [Identity.load_or_create(name, keys / name / "identity.key") for name in names])
    print(f"roster: {roster}")


@federation_app.command("identity")
def identity_command(
    owner: Annotated[str, typer.Argument(help="The owner's name.")],
    keys: Annotated[Path, typer.Option(help="Its private folder; identity.key is made there if it has none.")],
) -> None:
    """Print an owner's line of the roster."""
    import json

    from hecompile.runtime.federation.protocol.channels import Identity

    print(json.dumps({owner: Identity.load_or_create(owner, keys / "identity.key").public.hex()}))
