"""The same rounds carried by Flower (flwr 1.41): a ServerApp and a ClientApp, used by the app in deploy/flower.

A message is one ConfigRecord with the bytes of `messages.to_bytes`; Flower carries it and knows nothing of what is in it. A
ClientApp may run in a new process for every message, so that the keys of a round are in the owner's private folder
(`keyring.DirectoryKeys`), never in Flower's own context, which Flower serializes.

Run configuration: `recipe`, `roster`, and `keys`, a folder with one private folder per owner (in simulation; a SuperNode
gives its own with `--node-config 'owner="NAME" keys="FOLDER"'`). `overrides` changes the recipe, separated by spaces.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flwr.app import ConfigRecord, Context, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from hecompile.errors import FederationError
from runtime.federation.channels import Identity
from runtime.federation.client import Participant
from runtime.federation.keyring import DirectoryKeys
from runtime.federation.launch import ADAPTER_DIR, RoundLog, read_roster
from runtime.federation.messages import Finished, Message, Start, from_bytes, read_header, to_bytes
from runtime.federation.owner import local_trainer, owner_ledger, owner_model, owner_promise, plaintext_model
from runtime.federation.recipe import FederationRecipe, load_federation
from runtime.federation.rounds import Federation

_log = logging.getLogger(__name__)
_RECORD, _PAYLOAD, _OWNER = "federation", "payload", "owner"
_HELLO, _ROUND, _TRAIN = "query.hello", "query.round", "train.round"
_JOIN_SECONDS = 300.0

server_app = ServerApp()
client_app = ClientApp()


def _recipe(context: Context) -> FederationRecipe:
    overrides = str(context.run_config.get("overrides", "")).split()
    return load_federation(str(context.run_config["recipe"]), overrides)


def _owner(context: Context, recipe: FederationRecipe) -> str:
    named = context.node_config.get(_OWNER)
    return str(named) if named is not None else recipe.names[int(context.node_config["partition-id"])]


def _rounds_left(recipe: FederationRecipe, request: Message) -> int:
    """This one and those after it: a promise is calibrated anew in every round, on top of what its ledger has."""
    number = read_header(request.header).number if isinstance(request, Start) else 1
    return max(1, recipe.federation.rounds + 1 - number)


def _keys(context: Context, owner: str) -> Path:
    own = context.node_config.get("keys")
    return Path(str(own)) if own is not None else Path(str(context.run_config["keys"])) / owner


class GridExchange:
    """An `Exchange` over Flower's grid. Owners say who they are once; that they are is proven by every round's signature."""

    def __init__(self, grid: Grid, owners: list[str], reply_timeout: float) -> None:
        self._grid = grid
        self._reply_timeout = reply_timeout
        self._nodes = self._meet(owners)

    def __call__(self, requests: Mapping[str, Message]) -> dict[str, Message]:
        """See `Exchange`."""
        owners = {self._nodes[name]: name for name in requests if name in self._nodes}
        messages = []
        for node, name in owners.items():
            request = requests[name]
            content = RecordDict({_RECORD: ConfigRecord({_PAYLOAD: to_bytes(request)})})
            kind = _TRAIN if isinstance(request, Start) else _ROUND
            messages.append(FlowerMessage(content, node, kind, ttl=self._reply_timeout))
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
        deadline = time.monotonic() + _JOIN_SECONDS
        while len(nodes := list(self._grid.get_node_ids())) < len(owners):
            if time.monotonic() > deadline:
                raise FederationError(f"{len(nodes)} of {len(owners)} nodes connected within {_JOIN_SECONDS:g} s")
            time.sleep(0.5)
        asking = [FlowerMessage(RecordDict({_RECORD: ConfigRecord({})}), node, _HELLO) for node in nodes]
        found: dict[str, int] = {}
        for reply in self._grid.send_and_receive(asking, timeout=_JOIN_SECONDS):
            if not reply.has_error():
                name = str(reply.content.config_records[_RECORD][_OWNER])
                if name in found:
                    raise FederationError(f"two nodes say that they are {name!r}")
                found[name] = reply.metadata.src_node_id
        return found


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds of the recipe."""
    recipe = _recipe(context)
    roster = read_roster(Path(str(context.run_config["roster"])))
    local = plaintext_model(recipe)
    exchange = GridExchange(grid, recipe.names, recipe.reply_timeout)
    out = recipe.training.output_dir
    adapter = local.layout.flatten(local.model.adapter_state())
    with RoundLog(out, adapter, lambda line: _log.warning("%s", line)) as log:
        try:
            Federation(recipe.agreement(), roster, local.layout).run(adapter, exchange, log.report)
        finally:
            local.save(log.adapter, out / ADAPTER_DIR, recipe.model)


@client_app.query("hello")
def hello(message: FlowerMessage, context: Context) -> FlowerMessage:
    """Whose node this is."""
    record = ConfigRecord({_OWNER: _owner(context, _recipe(context))})
    return FlowerMessage(RecordDict({_RECORD: record}), reply_to=message)


@client_app.query("round")
@client_app.train("round")
def answer(message: FlowerMessage, context: Context) -> FlowerMessage:
    """A message of a round; the last one is not answered but its adapter saved."""
    recipe = _recipe(context)
    name = _owner(context, recipe)
    content = message.content.config_records[_RECORD][_PAYLOAD]
    if not isinstance(content, bytes):
        raise FederationError("a message of the federation holds no bytes")
    request = from_bytes(content)
    owner, keys = recipe.owner(name), _keys(context, name)
    identity, roster = (
        Identity.load_or_create(name, keys / "identity.key"),
        read_roster(Path(str(context.run_config["roster"]))),
    )
    training = owner if isinstance(request, Start) else owner.model_copy(update={"privacy": None})
    with (
        owner_model(recipe, owner) as local,
        owner_promise(recipe, training, local, _rounds_left(recipe, request)) as private,
        owner_ledger(recipe, owner, keys) as ledger,
    ):
        if isinstance(request, Finished):
            local.save(
                np.frombuffer(request.adapter, dtype="<f4"),
                recipe.training.output_dir / name / ADAPTER_DIR,
                recipe.model,
            )
            payload = b""
        else:
            participant = Participant(
                identity, roster, recipe.agreement(), local.layout, DirectoryKeys(keys / "rounds"),
                local_trainer(recipe, owner, local, private), ledger,
            )  # fmt: skip
            payload = to_bytes(participant.answer_or_refuse(request))
    return FlowerMessage(RecordDict({_RECORD: ConfigRecord({_PAYLOAD: payload})}), reply_to=message)
