"""Carry the rounds of a federation over Flower (flwr 1.41): a ServerApp and a ClientApp, used by deploy/flower.

A message is one ConfigRecord with the bytes of `messages.to_bytes`; Flower knows nothing of what is in it. A ClientApp may
run in a new process for every message. The keys of a round are therefore in the owner's private folder
(`keyring.DirectoryKeys`), never in Flower's own context, which Flower serializes.

A SuperNode says whose it is and where its own copies of recipe and roster and its private folder are. The run's
configuration, which comes from whoever started the run, is then not looked at:

    --node-config 'owner="NAME" recipe="FILE" roster="FILE" keys="FOLDER"'

An owner's record of its rounds is there too: it is in one federation, until its file is removed. With `resume=true` in the
run's configuration the server goes on with the federation that was interrupted in its output directory.

In simulation, where nodes have a number instead, the run's configuration has `recipe`, `roster`, `keys` (a folder with one
private folder per owner) and `overrides` of the recipe, separated by spaces. The ServerApp reads that always.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flwr.app import ConfigRecord, Context, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from hecompile.errors import FederationError, InputError
from hecompile.runtime.federation.events import line_for
from hecompile.runtime.federation.local_model import owner_model, plaintext_model
from hecompile.runtime.federation.output import only_owner, only_server
from hecompile.runtime.federation.owner import ROUNDS_DIR, local_trainer, owner_ledger, owner_promise, save_finished
from hecompile.runtime.federation.protocol.keyring import DirectoryKeys
from hecompile.runtime.federation.protocol.messages import Finished, Message, Start, from_bytes, read_header, to_bytes
from hecompile.runtime.federation.protocol.participant import Participant
from hecompile.runtime.federation.recipe import FederationRecipe, load_federation
from hecompile.runtime.federation.roster import own_identity, read_roster
from hecompile.runtime.federation.server import check_output, run_rounds

_log = logging.getLogger(__name__)
_RECORD, _PAYLOAD, _OWNER = "federation", "payload", "owner"
_HELLO, _ROUND, _TRAIN = "query.hello", "query.round", "train.round"
_JOIN_SECONDS = 300.0

server_app = ServerApp()
client_app = ClientApp()


@dataclass(frozen=True)
class _Place:
    """Say which owner a node is, and where its own files are."""

    recipe: FederationRecipe
    owner: str
    roster: Path
    keys: Path


def _server_recipe(context: Context) -> FederationRecipe:
    overrides = str(context.run_config.get("overrides", "")).split()
    return load_federation(str(context.run_config["recipe"]), overrides)


def _place(context: Context) -> _Place:
    node, run = context.node_config, context.run_config
    if _OWNER in node:
        missing = [name for name in ("recipe", "roster", "keys") if name not in node]
        if missing:
            raise InputError(f"--node-config lacks {', '.join(missing)}")
        recipe = load_federation(str(node["recipe"]))
        return _Place(recipe, str(node[_OWNER]), Path(str(node["roster"])), Path(str(node["keys"])))
    recipe = _server_recipe(context)
    name = recipe.names[int(node["partition-id"])]
    return _Place(recipe, name, Path(str(run["roster"])), Path(str(run["keys"])) / name)


def _rounds_left(recipe: FederationRecipe, request: Message) -> int:
    """Count this round and those after it: noise is calibrated anew in every round, on top of what the ledger has."""
    number = read_header(request.header).number if isinstance(request, Start) else 1
    return max(1, recipe.federation.rounds + 1 - number)


class GridExchange:
    """Exchange messages over Flower's grid, as an `Exchange`.

    Nodes say once whose they are. The signature of every round proves it.
    """

    def __init__(self, grid: Grid, owners: list[str], reply_timeout: float) -> None:
        self._grid = grid
        self._reply_timeout = reply_timeout
        self._nodes = self._meet(owners)

    def __call__(self, requests: Mapping[str, Message]) -> dict[str, Message]:
        """Send each owner its message and return the replies, as `Exchange` says."""
        owners = {self._nodes[name]: name for name in requests if name in self._nodes}
        messages = []
        for node, name in owners.items():
            request = requests[name]
            kind = _TRAIN if isinstance(request, Start) else _ROUND
            messages.append(FlowerMessage(_content({_PAYLOAD: to_bytes(request)}), node, kind, ttl=self._reply_timeout))
        replies: dict[str, Message] = {}
        for reply in self._grid.send_and_receive(messages, timeout=self._reply_timeout):
            name = owners[reply.metadata.src_node_id]
            if reply.has_error():
                _log.warning("%s did not answer (%s); the round goes on if enough are left", name, reply.error.reason)
                continue
            payload = reply.content.config_records[_RECORD].get(_PAYLOAD)
            if isinstance(payload, bytes) and payload:
                replies[name] = from_bytes(payload)
        return replies

    def _meet(self, owners: list[str]) -> dict[str, int]:
        """Wait for as many nodes as there are owners, ask each whose it is, and return the nodes by owner."""
        deadline = time.monotonic() + _JOIN_SECONDS
        while len(nodes := list(self._grid.get_node_ids())) < len(owners):
            if time.monotonic() > deadline:
                raise FederationError(f"{len(nodes)} of {len(owners)} nodes connected within {_JOIN_SECONDS:g} s")
            time.sleep(0.5)
        questions = [FlowerMessage(_content({}), node, _HELLO) for node in nodes]
        by_owner: dict[str, int] = {}
        for reply in self._grid.send_and_receive(questions, timeout=_JOIN_SECONDS):
            if not reply.has_error():
                name = str(reply.content.config_records[_RECORD][_OWNER])
                if name in by_owner:
                    raise FederationError(f"two nodes say that they are {name!r}")
                by_owner[name] = reply.metadata.src_node_id
        return by_owner


def _content(values: Mapping[str, str | bytes]) -> RecordDict:
    return RecordDict({_RECORD: ConfigRecord({**values})})


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds of the recipe, and write rounds.jsonl and the adapter."""
    recipe = _server_recipe(context)
    resume = bool(context.run_config.get("resume", False))
    with only_server(recipe.training):
        check_output(recipe, resume=resume)
        roster = read_roster(Path(str(context.run_config["roster"])))
        local = plaintext_model(recipe)
        exchange = GridExchange(grid, recipe.names, recipe.reply_timeout)
        run_rounds(recipe, roster, local, exchange, _log_event, resume=resume)


def _log_event(event: str, /, **fields: str | int | float | None) -> None:
    _log.warning("%s", line_for(event, fields))


@client_app.query("hello")
def hello(message: FlowerMessage, context: Context) -> FlowerMessage:
    """Answer whose node this is."""
    return FlowerMessage(_content({_OWNER: _place(context).owner}), reply_to=message)


@client_app.query("round")
@client_app.train("round")
def answer(message: FlowerMessage, context: Context) -> FlowerMessage:
    """Answer a message of a round; at the last one, save its adapter and answer nothing."""
    place = _place(context)
    content = message.content.config_records[_RECORD][_PAYLOAD]
    if not isinstance(content, bytes):
        raise FederationError("a message of the federation holds no bytes")
    payload = _answer(place, from_bytes(content))
    return FlowerMessage(_content({_PAYLOAD: payload}), reply_to=message)


def _answer(place: _Place, request: Message) -> bytes:
    recipe, owner = place.recipe, place.recipe.owner(place.owner)
    training = owner if isinstance(request, Start) else owner.model_copy(update={"privacy": None})
    with (
        only_owner(recipe.training, owner.name),  # per message: a node has no life between two
        owner_model(recipe, owner) as local,
        owner_promise(recipe, training, local, _rounds_left(recipe, request)) as private,
        owner_ledger(recipe, owner) as ledger,
    ):
        rounds = DirectoryKeys(place.keys / ROUNDS_DIR)
        if isinstance(request, Finished):
            save_finished(recipe, owner.name, local, request)
            rounds.finish()
            return b""
        participant = Participant(
            own_identity(owner.name, place.keys),
            recipe.terms(read_roster(place.roster), local.layout),
            rounds,
            local_trainer(recipe, owner, local, private),
            ledger,
        )
        return to_bytes(participant.answer_or_refuse(request))
