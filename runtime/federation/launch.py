"""Run a federation on this machine: a server and every owner as processes of their own, over loopback sockets."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file

from hecompile.errors import FederationError
from hecompile.files import only_writer
from hecompile.runtime.federation.events import FAILED, LISTENING, ROUND, line_for
from hecompile.runtime.federation.local_model import plaintext_model
from hecompile.runtime.federation.output import (
    ADAPTER_DIR,
    KEYS_DIR,
    ROSTER_FILE,
    only_server,
    require_directory,
    require_free,
)
from hecompile.runtime.federation.recipe import FederationRecipe, load_federation
from hecompile.runtime.federation.records import RoundRecord, read_records
from hecompile.runtime.federation.roster import own_identity, write_roster
from hecompile.runtime.federation.state import can_resume_owner, check_unfinished, is_interrupted
from hecompile.runtime.model.adapter import WEIGHTS_FILE
from hecompile.runtime.wire.events import read_event
from hecompile.runtime.worker.process import stop_process

_STOP_SECONDS, _POLL_SECONDS = 20.0, 0.2
_RESUME = ("--resume",)


@dataclass(frozen=True)
class Processes:
    """Hold the processes of a running federation: the server's, and the owners' by name."""

    server: subprocess.Popen[str]
    owners: dict[str, subprocess.Popen[str]]


def run_processes(
    recipe_file: Path, overrides: Sequence[str], say: Callable[[str], None], *, resume: bool = False
) -> list[RoundRecord]:
    """Run the whole federation, or with `resume` the rest of one, say what happens, and return the records of its rounds.

    Raises FederationError with the reason where it fails.
    """
    recipe = load_federation(recipe_file, overrides)
    out = recipe.training.output_dir
    with processes(recipe_file, overrides, say, resume=resume) as running:
        reason = _follow_server(running, say)
        failed_owners = _wait_for_owners(running)
        for owner, own_reason in failed_owners.items():
            say(f"{owner} ended early: {own_reason}")
        if running.server.returncode < 0 and failed_owners:
            reasons = "; ".join(f"{owner}: {own_reason}" for owner, own_reason in failed_owners.items())
            raise FederationError(f"the federation did not begin; {reasons}")
        if running.server.returncode != 0:
            raise FederationError(reason)
    return read_records(out)


def check_output(recipe: FederationRecipe, resume: bool) -> None:
    """Raise InputError where a federation must not be replaced, there is none to resume, or another process runs one."""
    require_directory(recipe.training)
    with _launching(recipe), only_server(recipe.training):
        _replaces(recipe, resume)


def _launching(recipe: FederationRecipe) -> AbstractContextManager[None]:
    """Keep others from starting a federation in the output directory; its server and owners lock what is theirs."""
    out = recipe.training.output_dir
    return only_writer(out / KEYS_DIR, f"training.output_dir {out}", folder=True)


def _replaces(recipe: FederationRecipe, resume: bool) -> bool:
    """Return whether a federation is to be replaced. Raises InputError where none may be, or there is none to resume."""
    if resume:
        check_unfinished(recipe)
        return False
    interrupted = is_interrupted(recipe.training.output_dir)
    return require_free(recipe.training, server=True, owners=recipe.names, interrupted=interrupted)


@contextmanager
def processes(
    recipe_file: Path, overrides: Sequence[str], say: Callable[[str], None] = lambda _: None, *, resume: bool = False
) -> Iterator[Processes]:
    """Start the server and all owners of the recipe; all are ended at the end.

    They have the identities that are in the output directory, or fresh ones. What an earlier federation wrote stays until
    all owners have come to this one.
    """
    recipe = load_federation(recipe_file, overrides)
    out = recipe.training.output_dir
    folders = {name: out / KEYS_DIR / name for name in recipe.names}
    with _launching(recipe):  # until the end
        with only_server(recipe.training):
            if _replaces(recipe, resume):
                say(f"replacing the federation in {out} (training.overwrite_output_dir)")
            write_roster(out / ROSTER_FILE, [own_identity(name, folder) for name, folder in folders.items()])
        with _started(recipe_file, recipe, overrides, folders, resume) as running:
            yield running


@contextmanager
def _started(
    recipe_file: Path, recipe: FederationRecipe, overrides: Sequence[str], folders: Mapping[str, Path], resume: bool
) -> Iterator[Processes]:
    out = recipe.training.output_dir
    common = [str(recipe_file), *overrides, "--roster", str(out / ROSTER_FILE), "--events", "json"]
    environment = _environment(recipe)
    started: list[subprocess.Popen[str]] = []

    def start(role: str, *options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-W", "ignore", "-m", "hecompile.cli", "federation", role, *common, *options]
        process = subprocess.Popen(  # noqa: S603  this program
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        started.append(process)
        return process

    try:
        server = start("serve", "--port", "0", *_RESUME[:resume])
        address = _address_of(server)
        owners = {
            name: start(
                "join", "--owner", name, "--keys", str(folder), "--server", address,
                *_RESUME[: resume and can_resume_owner(recipe, name)],  # one that was killed before its first round begins
            )
            for name, folder in folders.items()
        }  # fmt: skip
        yield Processes(server, owners)
    finally:
        for process in started:
            process.terminate()  # all at once, so that none is waited for before the next is told
        for process in started:
            stop_process(process)


def _environment(recipe: FederationRecipe) -> dict[str, str]:
    """Return the environment of a process: the cores are shared out over the owners."""
    threads = max(1, (os.cpu_count() or 1) // len(recipe.owners))
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}


def _address_of(server: subprocess.Popen[str]) -> str:
    """Wait until the server listens, and return where. Raises FederationError with the reason where it ends before."""
    assert server.stdout is not None
    lines = []
    for line in server.stdout:
        event = read_event(line)
        if event is not None and event["event"] == LISTENING:
            return str(event["address"])
        lines.append(line)
    _, errors = server.communicate(timeout=_STOP_SECONDS)
    raise FederationError(f"the server did not start: {_failure(lines, errors)}")


def _follow_server(running: Processes, say: Callable[[str], None]) -> str:
    """Say each finished round until the server has ended, and return why it failed, if it did."""
    server = running.server
    assert server.stdout is not None
    begun = threading.Event()
    watcher = threading.Thread(target=_end_if_an_owner_fails, args=(running, begun), daemon=True)
    watcher.start()
    lines = []
    for line in server.stdout:
        event = read_event(line)
        if event is not None and event["event"] == ROUND:
            begun.set()
            say(line_for(ROUND, event))
        lines.append(line)
    begun.set()
    watcher.join()
    _, errors = server.communicate()
    return _failure(lines, errors)


def _end_if_an_owner_fails(running: Processes, begun: threading.Event) -> None:
    """End the server if an owner gives up before the first round is done: it cannot come any more, and is waited for.

    An owner that was killed is another matter: rounds go on without it.
    """
    while not begun.wait(_POLL_SECONDS):
        if any((process.poll() or 0) > 0 for process in running.owners.values()):
            running.server.terminate()
            return


def _wait_for_owners(running: Processes) -> dict[str, str]:
    """Wait until the owners have ended, after the server has, and return why they failed, by name."""
    reasons = {}
    for name, process in running.owners.items():
        if running.server.returncode != 0 and process.poll() is None:
            process.terminate()  # it has nobody left to talk to
        output, errors = process.communicate(timeout=_STOP_SECONDS)
        if process.returncode > 0:
            reasons[name] = _failure(output.splitlines(), errors)
    return reasons


def _failure(output: Iterable[str], errors: str) -> str:
    """Return why a process failed: what its event says, else the last line of its error stream."""
    events: list[dict[str, Any]] = [event for line in output if (event := read_event(line)) is not None]
    reasons = [str(event["reason"]) for event in events if event["event"] == FAILED]
    return (reasons or errors.strip().splitlines() or ["it ended without a message"])[-1]


def read_adapter(recipe: FederationRecipe) -> NDArray[np.float32]:
    """Read the global adapter that the server wrote, float32 `[size]`."""
    state = load_file(recipe.training.output_dir / ADAPTER_DIR / WEIGHTS_FILE)
    return plaintext_model(recipe).layout.flatten(state)
