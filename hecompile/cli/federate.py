"""Run `hecompile federate`, a federation on this machine, and `hecompile federation`, its parts in a process each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hecompile.cli.console import EVENTS
from hecompile.cli.options import FederationRecipePath, Overrides
from hecompile.terminal import counted, shown_path, wide_console

if TYPE_CHECKING:  # imported when a command runs: help is to be quick
    from hecompile.runtime.federation.recipe import FederationRecipe

federation_app = typer.Typer(no_args_is_help=True, help="Run one process of a federation: the server, or an owner.")

OwnerKeys = Annotated[
    Path, typer.Option(help="This owner's private folder; identity.key is made there if it has none.")
]
RosterFile = Annotated[Path, typer.Option(help="JSON of the owners' names and public keys.")]
Resume = Annotated[bool, typer.Option(help="Go on with the federation that was interrupted in training.output_dir.")]
Events = Annotated[str, EVENTS]


def _load(recipe: Path, overrides: list[str] | None = None) -> FederationRecipe:
    """Load a recipe, and show no progress of loading models from here on: every process would show its own."""
    import transformers

    from hecompile.runtime.federation.recipe import load_federation

    transformers.utils.logging.disable_progress_bar()
    return load_federation(recipe, overrides or ())


def federate(
    recipe: FederationRecipePath,
    overrides: Overrides = None,
    compare: Annotated[
        bool,
        typer.Option(
            help="Also train each owner alone, and all with updates averaged in the clear, and show all three."
        ),
    ] = True,
    resume: Resume = False,
) -> None:
    """Train one adapter from several owners' private data: a server process and one per owner over loopback sockets. The
    server adds encrypted updates and learns their sum alone."""
    from hecompile.he.security import show_bits
    from hecompile.runtime.federation.launch import check_output, read_adapter, run_processes
    from hecompile.runtime.federation.report import accuracy_table, bytes_line, check_tables

    console = wide_console()
    loaded = _load(recipe, overrides)
    agreement = loaded.agreement()
    console.print(
        f"{len(loaded.owners)} owners, {counted(agreement.section.rounds, 'round')}; {agreement.threshold} open a sum, "
        f"at least {agreement.minimum} are in it; {show_bits(agreement.parameters().security_bits)}",
        soft_wrap=True,
    )
    check_output(loaded, resume)
    check_tables(loaded, compare)
    with _telling_how_to_go_on(loaded.training.output_dir):
        records = run_processes(
            recipe, overrides or (), lambda line: console.print(line, soft_wrap=True), resume=resume
        )
    console.print(bytes_line(records), soft_wrap=True)
    # Before the tables: whatever fails from here on, the result is there and named.
    console.print(f"PEFT adapter: {shown_path(loaded.training.output_dir / 'adapter')}", soft_wrap=True)
    adapters = {"federated, encrypted" + (" and pruned" if agreement.section.pruning else ""): read_adapter(loaded)}
    console.print(accuracy_table(loaded, adapters, compare, lambda line: console.print(line, soft_wrap=True)))


@contextmanager
def _telling_how_to_go_on(out: Path) -> Iterator[None]:
    """Say of a federation that ends early that it can be resumed, where it can."""
    from hecompile.errors import FederationError
    from hecompile.runtime.federation.state import is_interrupted

    try:
        yield
    except (KeyboardInterrupt, FederationError) as error:
        if not is_interrupted(out):
            raise
        on = f"the same command with --resume goes on from the last round in {shown_path(out)}"
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(on) from None
        raise FederationError(f"{str(error).rstrip('.')}. The rounds before are kept: {on}") from None


@federation_app.command("serve")
def serve_command(
    recipe: FederationRecipePath,
    roster: RosterFile,
    overrides: Overrides = None,
    port: Annotated[int, typer.Option(help="Port on the loopback address; 0 picks a free one.")] = 7800,
    resume: Resume = False,
    events: Events = "text",
) -> None:
    """Run the server: wait for all owners of the recipe, then run its rounds."""
    from hecompile.runtime.federation.events import ADAPTER, reporting
    from hecompile.runtime.federation.roster import read_roster
    from hecompile.runtime.federation.server import serve

    with reporting(events) as report:
        directory = serve(_load(recipe, overrides), read_roster(roster), port, report, resume=resume)
        report(ADAPTER, directory=str(directory))


@federation_app.command("join")
def join_command(
    recipe: FederationRecipePath,
    owner: Annotated[str, typer.Option(help="Name of the owner in the recipe.")],
    roster: RosterFile,
    keys: OwnerKeys,
    overrides: Overrides = None,
    server: Annotated[str, typer.Option(help="Where `hecompile federation serve` listens.")] = "tcp://127.0.0.1:7800",
    resume: Resume = False,
    events: Events = "text",
) -> None:
    """Take part as an owner: train on its own data and send encrypted updates until the federation is over."""
    from hecompile.runtime.federation.events import ADAPTER, reporting
    from hecompile.runtime.federation.owner import join
    from hecompile.runtime.federation.roster import read_roster

    with reporting(events) as report:
        loaded = _load(recipe, overrides)
        directory = join(loaded, owner, read_roster(roster), keys, server, resume=resume)
        report(ADAPTER, directory=str(directory))


@federation_app.command("identities")
def identities_command(
    recipe: FederationRecipePath,
    keys: Annotated[Path, typer.Option(help="Gets a private folder with identity.key for every owner.")],
    roster: Annotated[Path, typer.Option(help="Where to write the roster.")],
) -> None:
    """Make identities of all owners of a recipe and their roster, for trying a federation out on one machine."""
    from hecompile.runtime.federation.roster import own_identity, write_roster

    write_roster(roster, [own_identity(name, keys / name) for name in _load(recipe).names])
    print(f"roster: {roster}")


@federation_app.command("identity")
def identity_command(
    owner: Annotated[str, typer.Argument(help="Name of the owner in the recipe.")],
    keys: OwnerKeys,
) -> None:
    """Print an owner's line of the roster."""
    import json

    from hecompile.runtime.federation.roster import own_identity

    print(json.dumps({owner: own_identity(owner, keys).public.hex()}))
