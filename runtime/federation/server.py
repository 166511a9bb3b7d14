"""Run the server's side of a federation: all rounds, over any exchange or as a process over loopback sockets."""

from __future__ import annotations

from pathlib import Path

from hecompile.runtime.federation.events import LISTENING, Report
from hecompile.runtime.federation.local_model import LocalModel, plaintext_model
from hecompile.runtime.federation.output import ADAPTER_DIR, only_server, require_free
from hecompile.runtime.federation.protocol.channels import Roster
from hecompile.runtime.federation.protocol.rounds import Exchange, Federation
from hecompile.runtime.federation.recipe import FederationRecipe
from hecompile.runtime.federation.records import RoundLog
from hecompile.runtime.federation.sockets import FederationServer

_JOIN_SECONDS = 180.0


def run_rounds(recipe: FederationRecipe, roster: Roster, local: LocalModel, exchange: Exchange, report: Report) -> Path:
    """Run the rounds from `local`'s adapter, write rounds.jsonl and the adapter, and return the adapter's directory.

    Raises FederationError where a round fails; the adapter of the last good round is written all the same.
    """
    out = recipe.training.output_dir
    adapter = local.layout.flatten(local.model.adapter_state())
    with RoundLog(out, adapter, report) as log:
        try:
            Federation(recipe.terms(roster, local.layout)).run(adapter, exchange, log.add)
        finally:
            directory = local.save(log.adapter, out / ADAPTER_DIR, recipe.model)
    return directory


def serve(recipe: FederationRecipe, roster: Roster, port: int, report: Report) -> Path:
    """Wait for all owners on a loopback port (0 picks a free one), then `run_rounds`; returns the adapter's directory.

    Raises:
        FederationError: an owner did not come in time, or a round failed.
        InputError: the output directory holds a federation which the recipe does not allow to replace.
    """
    with only_server(recipe.training):
        return _serve(recipe, roster, port, report)


def _serve(recipe: FederationRecipe, roster: Roster, port: int, report: Report) -> Path:
    require_free(recipe.training, server=True)
    local = plaintext_model(recipe)
    with FederationServer(roster, port=port, reply_timeout=recipe.reply_timeout) as server:
        report(LISTENING, address=server.address)
        server.wait_for(len(recipe.owners), _JOIN_SECONDS)
        return run_rounds(recipe, roster, local, server, report)
