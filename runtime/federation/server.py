"""Run the server's side of a federation: all rounds, over any exchange or as a process over loopback sockets."""

from __future__ import annotations

from pathlib import Path

from hecompile.runtime.federation.events import LISTENING, Report
from hecompile.runtime.federation.local_model import LocalModel, plaintext_model
from hecompile.runtime.federation.output import ADAPTER_DIR, only_server, require_directory, require_free
from hecompile.runtime.federation.protocol.channels import Roster
from hecompile.runtime.federation.protocol.rounds import Exchange, Federation
from hecompile.runtime.federation.recipe import FederationRecipe
from hecompile.runtime.federation.records import RoundLog
from hecompile.runtime.federation.sockets import JOIN_SECONDS, FederationServer
from hecompile.runtime.federation.state import ServerState, is_interrupted


def run_rounds(
    recipe: FederationRecipe,
    roster: Roster,
    local: LocalModel,
    exchange: Exchange,
    report: Report,
    *,
    resume: bool = False,
) -> Path:
    """Run the rounds from `local`'s adapter, write rounds.jsonl and the adapter, and return the adapter's directory.

    With `resume`, go on from what an interrupted federation left. Raises FederationError where a round fails; the adapter
    of the last good round is written all the same. Raises InputError where there is nothing to resume.
    """
    out = recipe.training.output_dir
    state = (
        ServerState.load(recipe)
        if resume
        else ServerState.begin(recipe, local.layout.flatten(local.model.adapter_state()))
    )
    with RoundLog(out, state, report, resume=resume) as log:
        try:
            Federation(recipe.terms(roster, local.layout), state.federation).run(
                state.adapter, exchange, log.add, complete=state.complete, pending=state.pending, save=state.save
            )
        finally:
            directory = local.save(state.adapter, out / ADAPTER_DIR, recipe.model)
    return directory


def check_output(recipe: FederationRecipe, *, resume: bool) -> None:
    """Raise InputError where the output directory holds a federation that this one must not replace, or none to resume."""
    if resume:
        require_directory(recipe.training)
        ServerState.load(recipe)
    else:
        require_free(recipe.training, server=True, interrupted=is_interrupted(recipe.training.output_dir))


def serve(recipe: FederationRecipe, roster: Roster, port: int, report: Report, *, resume: bool = False) -> Path:
    """Wait for all owners on a loopback port (0 picks a free one), then `run_rounds`; returns the adapter's directory.

    One that is resumed goes on with as many as a sum takes, where the others do not come in time.

    Raises:
        FederationError: an owner did not come in time, or a round failed.
        InputError: the output directory holds a federation which the recipe does not allow to replace, or none to resume;
            or a server runs there already.
    """
    with only_server(recipe.training):
        return _serve(recipe, roster, port, report, resume)


def _serve(recipe: FederationRecipe, roster: Roster, port: int, report: Report, resume: bool) -> Path:
    check_output(recipe, resume=resume)
    local = plaintext_model(recipe)
    with FederationServer(roster, port=port, reply_timeout=recipe.reply_timeout) as server:
        report(LISTENING, address=server.address)
        server.wait_for(len(recipe.owners), JOIN_SECONDS, recipe.agreement().fewest if resume else None)
        return run_rounds(recipe, roster, local, server, report, resume=resume)
