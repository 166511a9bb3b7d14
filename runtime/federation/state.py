"""Keep what a federation goes on from when a process of it was interrupted.

OUTPUT/federation.state       the server's: rounds done, the adapter after them, and the round that was under way
OUTPUT/OWNER/federation.json  the recipe that an owner began with; its rounds are in its private folder (`keyring`)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hecompile.errors import FederationError, InputError
from hecompile.files import write_whole
from hecompile.runtime.federation.output import ADAPTER_DIR, OWNER_STATE_FILE, STATE_FILE
from hecompile.runtime.federation.protocol.messages import Message, Pending, read_as, to_bytes
from hecompile.runtime.federation.protocol.server_round import new_federation
from hecompile.runtime.federation.recipe import FederationRecipe

_MISSING = "not there"


class State(Message):
    """Hold the server's state as it is on disk; `adapter` is the global one after `complete` rounds, float32."""

    kind = "state"
    federation: str
    recipe: dict[str, Any]
    complete: int
    adapter: bytes
    pending: Pending | None


class ServerState:
    """Hold the state of a server's federation, and write it whole at every change."""

    def __init__(self, out: Path, state: State) -> None:
        self._path = out / STATE_FILE
        self._state = state

    @staticmethod
    def begin(recipe: FederationRecipe, adapter: NDArray[np.float32]) -> ServerState:
        """Return the state of a new federation that starts from `adapter`; it is on disk from the first `save` on."""
        content = adapter.astype("<f4").tobytes()
        state = State(
            federation=new_federation(), recipe=settings_of(recipe), complete=0, adapter=content, pending=None
        )
        return ServerState(recipe.training.output_dir, state)

    @staticmethod
    def load(recipe: FederationRecipe) -> ServerState:
        """Read the state of the federation in the recipe's output directory.

        Raises InputError where there is none, it is damaged, or it was begun with another recipe.
        """
        out = recipe.training.output_dir
        path = out / STATE_FILE
        if not path.is_file():
            raise InputError(f"nothing to resume: {out} has no {STATE_FILE}; start the federation without resuming")
        try:
            state = read_as(State, path.read_bytes())
        except FederationError:
            raise InputError(f"{path} is damaged, or of another release; start a new federation") from None
        refuse_changes(path, state.recipe, settings_of(recipe))
        return ServerState(out, state)

    @property
    def federation(self) -> str:
        return self._state.federation

    @property
    def complete(self) -> int:
        """Return how many rounds are done."""
        return self._state.complete

    @property
    def pending(self) -> Pending | None:
        """Return the round that was under way, if one was."""
        return self._state.pending

    @property
    def adapter(self) -> NDArray[np.float32]:
        """Return the global adapter after the rounds that are done, float32 `[size]`."""
        return np.frombuffer(self._state.adapter, dtype="<f4").astype(np.float32)

    def save(self, pending: Pending) -> None:
        """Keep the round that is under way; it is on disk when this returns."""
        self._write(pending=pending)

    def advance(self, complete: int, adapter: NDArray[np.float32]) -> None:
        """Keep the adapter after `complete` rounds."""
        self._write(complete=complete, adapter=adapter.astype("<f4").tobytes(), pending=None)

    def _write(self, **changes: object) -> None:
        state = self._state.model_copy(update=changes)
        write_whole(self._path, to_bytes(state))
        self._state = state


def is_interrupted(out: Path) -> bool:
    """Return whether a server's federation is there that has rounds left."""
    try:
        state = read_as(State, (out / STATE_FILE).read_bytes())
        return state.complete < int(state.recipe["federation"]["rounds"])
    except (OSError, FederationError, KeyError, TypeError, ValueError):
        return False


def begin_owner(recipe: FederationRecipe, name: str) -> None:
    """Note what recipe an owner begins with."""
    folder = recipe.training.output_dir / name
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / OWNER_STATE_FILE, (json.dumps(settings_of(recipe)) + "\n").encode())


def can_resume_owner(recipe: FederationRecipe, name: str) -> bool:
    """Return whether an owner has begun a federation in the output directory."""
    return (recipe.training.output_dir / name / OWNER_STATE_FILE).is_file()


def check_owner(recipe: FederationRecipe, name: str) -> None:
    """Raise InputError where an owner has no federation to resume, or began it with another recipe."""
    path = recipe.training.output_dir / name / OWNER_STATE_FILE
    if not can_resume_owner(recipe, name):
        raise InputError(f"nothing to resume: {path.parent} has no {path.name}; join without resuming")
    try:
        begun = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise InputError(f"{path} is damaged; restore it, or start a new federation") from None
    refuse_changes(path, begun, settings_of(recipe))


def check_unfinished(recipe: FederationRecipe) -> None:
    """Raise InputError where there is nothing to resume: no federation, another recipe's, or one that everybody finished."""
    out, state = recipe.training.output_dir, ServerState.load(recipe)
    folders = [out, *(out / name for name in recipe.names)]
    if state.complete == recipe.federation.rounds and all((folder / ADAPTER_DIR).is_dir() for folder in folders):
        raise InputError(f"the federation in {out} is complete ({state.complete} rounds), there is nothing to resume")


def settings_of(recipe: FederationRecipe) -> dict[str, Any]:
    """Return the settings that a federation cannot go on with another value of."""
    settings = recipe.model_dump(mode="json", exclude={"reply_timeout": True})
    for key in ("output_dir", "overwrite_output_dir"):
        settings["training"].pop(key, None)
    for owner in settings["owners"]:
        for key in ("worker", "worker_bundle"):
            owner.pop(key, None)
    return dict(json.loads(json.dumps(settings)))


def refuse_changes(path: Path, begun: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise InputError that names the first setting with another value than the federation began with."""
    for key in sorted({*_leaves(begun), *_leaves(now)}):
        before, after = (_leaves(settings).get(key, _MISSING) for settings in (begun, now))
        if before != after:
            raise InputError(
                f"cannot resume {path}: {key} was {before} and is now {after}; restore it or start a new federation"
            )


def _leaves(value: object, prefix: str = "") -> dict[str, object]:
    """Return the values of nested settings by their dotted keys."""
    if not isinstance(value, (Mapping, list)) or not value:
        return {prefix: value}
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    found: dict[str, object] = {}
    for key, item in items:
        found |= _leaves(item, f"{prefix}.{key}" if prefix else str(key))
    return found
