"""A federation on this machine: a server and every owner in processes of their own over loopback sockets, and what it is
worth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file

from hecompile.errors import FederationError
from hecompile.runtime.federation.output import (
    ADAPTER_DIR,
    KEYS_DIR,
    ROSTER_FILE,
    ROUNDS_FILE,
    clear_owner,
    clear_server,
    require_free,
)
from hecompile.runtime.federation.owner import local_trainer, owner_ledger, owner_model, owner_promise, plaintext_model
from hecompile.runtime.federation.protocol.channels import Identity, Roster
from hecompile.runtime.federation.protocol.keyring import MemoryKeys
from hecompile.runtime.federation.protocol.participant import LocalUpdate, Participant
from hecompile.runtime.federation.protocol.rounds import Federation
from hecompile.runtime.federation.protocol.server_round import RoundResult
from hecompile.runtime.federation.protocol.settings import RoundHeader
from hecompile.runtime.federation.recipe import FederationRecipe, load_federation
from hecompile.runtime.federation.sockets import FederationServer, take_part
from hecompile.runtime.model.adapter import WEIGHTS_FILE

LISTENING = "listening on "
_STOP_SECONDS, _JOIN_SECONDS = 20.0, 180.0


@dataclass(frozen=True)
class RoundRecord:
    """A line of rounds.jsonl; no figure of any single owner."""

    round: int
    contributors: tuple[str, ...]
    opened_by: tuple[str, ...]
    samples: int
    coordinates: int
    bytes_up: int
    error_bound: float
    update_rms: float
    seconds: float


class RoundLog:
    """Writes rounds.jsonl, says a line per round, and keeps the adapter of the last good one. A context manager. It takes
    the place of an earlier federation's: make it when nothing but the rounds is left to go wrong."""

    def __init__(self, out: Path, adapter: NDArray[np.float32], say: Callable[[str], None]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        clear_server(out)
        self.adapter = adapter
        self._file = (out / ROUNDS_FILE).open("w", encoding="utf-8")
        self._say = say
        self.start()

    def start(self) -> None:
        """The clock of the next round."""
        self._started = time.monotonic()

    def report(self, number: int, result: RoundResult) -> None:
        """For `Federation.run`."""
        seconds = time.monotonic() - self._started
        record = RoundRecord(
            number, result.contributors, result.opened_by, result.samples, result.mean.size, result.bytes_up,
            result.error_bound, float(np.sqrt(np.mean(result.mean**2))), seconds,
        )  # fmt: skip
        self.adapter = result.adapter
        self._file.write(json.dumps(asdict(record)) + "\n")
        self._file.flush()
        counts = f"{len(result.contributors)} contributed, {len(result.opened_by)} opened"
        self._say(f"round {number}: {counts}, {seconds:.1f} s")
        self.start()

    def __enter__(self) -> RoundLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def write_roster(path: Path, identities: Sequence[Identity]) -> None:
    """Names and public keys, in hexadecimal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({one.name: one.public.hex() for one in identities}, indent=2) + "\n", encoding="utf-8")


def read_roster(path: Path) -> Roster:
    """What `write_roster` wrote. Raises FederationError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): bytes.fromhex(key) for name, key in content.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        raise FederationError(f"{path} is no roster: a JSON object of names and public keys in hexadecimal") from None


def serve(recipe: FederationRecipe, roster: Roster, port: int, say: Callable[[str], None]) -> Path:
    """The server's process: wait for the owners, all rounds, write rounds.jsonl and the adapter; returns its directory.

    Raises FederationError where a round fails; the adapter of the last good round is written all the same. Raises
    InputError where the output directory holds a federation and the recipe does not allow to replace it.
    """
    require_free(recipe.training, server=True)
    local = plaintext_model(recipe)
    out = recipe.training.output_dir
    adapter = local.layout.flatten(local.model.adapter_state())
    federation = Federation(recipe.agreement(), roster, local.layout)
    with FederationServer(roster, port=port, reply_timeout=recipe.reply_timeout) as server:
        say(LISTENING + server.address)
        server.wait_for(len(recipe.owners), _JOIN_SECONDS)
        with RoundLog(out, adapter, say) as log:
            try:
                federation.run(adapter, server, log.report)
            finally:
                directory = local.save(log.adapter, out / ADAPTER_DIR, recipe.model)
    return directory


def join(recipe: FederationRecipe, name: str, roster: Roster, keys: Path, address: str) -> Path:
    """An owner's process: take part until the end, then save the global adapter; returns its directory. Raises InputError
    as `serve` does, for the owner's own copy."""
    owner = recipe.owner(name)
    replaces = require_free(recipe.training, owners=[name])
    identity = Identity.load_or_create(name, keys / "identity.key")
    with (
        owner_model(recipe, owner) as local,
        owner_promise(recipe, owner, local) as private,
        owner_ledger(recipe, owner) as ledger,
    ):
        trainer = local_trainer(recipe, owner, local, private)

        def train(header: RoundHeader, adapter: NDArray[np.float32], mask: NDArray[np.bool_]) -> LocalUpdate:
            nonlocal replaces
            if replaces or header.number == 1:  # an owner that comes back in the middle keeps the metrics that it has
                clear_owner(recipe.training.output_dir, name)
                replaces = False
            return trainer(header, adapter, mask)

        participant = Participant(identity, roster, recipe.agreement(), local.layout, MemoryKeys(), train, ledger)
        finished = take_part(participant, identity, address)
        adapter = np.frombuffer(finished.adapter, dtype="<f4")
        return local.save(adapter, recipe.training.output_dir / name / ADAPTER_DIR, recipe.model)


@dataclass(frozen=True)
class Processes:
    """A running federation: the server's process, and the owners' by name."""

    server: subprocess.Popen[str]
    owners: dict[str, subprocess.Popen[str]]


@contextmanager
def processes(recipe_file: Path, overrides: Sequence[str]) -> Iterator[Processes]:
    """Start the server and all owners of the recipe, with the identities that the output directory has, or fresh ones; all
    are ended at the end. What an earlier federation wrote stays until all owners have come to this one."""
    recipe = load_federation(recipe_file, overrides)
    out = recipe.training.output_dir
    require_free(recipe.training, server=True, owners=recipe.names)
    folders = {name: out / KEYS_DIR / name for name in recipe.names}
    write_roster(
        out / ROSTER_FILE, [Identity.load_or_create(name, path / "identity.key") for name, path in folders.items()]
    )
    threads = str(max(1, (os.cpu_count() or 1) // len(recipe.owners)))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    started: dict[str, subprocess.Popen[str]] = {}

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-W", "ignore", "-m", "hecompile.cli", "federation", *arguments]
        command += ["--roster", str(out / ROSTER_FILE), *overrides]
        return subprocess.Popen(  # noqa: S603  this program
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )

    try:
        server = started["server"] = start("serve", str(recipe_file), "--port", "0")
        assert server.stdout is not None
        line = server.stdout.readline()
        if not line.startswith(LISTENING):
            _, errors = server.communicate(timeout=_STOP_SECONDS)
            raise FederationError(f"the server did not start: {(errors.strip().splitlines() or ['no message'])[-1]}")
        address = line.removeprefix(LISTENING).strip()
        for name, keys in folders.items():
            started[name] = start("join", str(recipe_file), "--owner", name, "--keys", str(keys), "--server", address)
        yield Processes(server, {name: started[name] for name in recipe.names})
    finally:
        for process in started.values():
            if process.poll() is None:
                process.terminate()
        for process in started.values():
            try:
                process.communicate(timeout=_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()


def run_processes(recipe_file: Path, overrides: Sequence[str], say: Callable[[str], None]) -> list[RoundRecord]:
    """The whole federation; the records of its rounds. Raises FederationError with the server's last words when it fails."""
    recipe = load_federation(recipe_file, overrides)
    if require_free(recipe.training, server=True, owners=recipe.names):
        say(f"replacing the federation in {recipe.training.output_dir} (training.overwrite_output_dir)")
    with processes(recipe_file, overrides) as running:
        assert running.server.stdout is not None
        begun = threading.Event()
        watcher = threading.Thread(target=_end_if_an_owner_fails, args=(running, begun), daemon=True)
        watcher.start()
        for line in running.server.stdout:
            if line.startswith("round "):
                begun.set()
                say(line.rstrip())
        begun.set()
        watcher.join()
        _, errors = running.server.communicate()
        reasons = []
        for name, process in running.owners.items():
            if running.server.returncode != 0 and process.poll() is None:
                process.terminate()  # it has nobody left to talk to
            _, own = process.communicate(timeout=_STOP_SECONDS)
            if process.returncode > 0:
                last = (own.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
                reasons.append(f"{name}: {last}")
                say(f"{name} ended early: {last}")
        if running.server.returncode < 0 and reasons:
            raise FederationError(f"the federation did not begin; {'; '.join(reasons)}")
        if running.server.returncode != 0:
            raise FederationError(
                (errors.strip().splitlines() or ["the server ended without a word"])[-1].removeprefix("error: ")
            )
    return read_records(recipe.training.output_dir)


def _end_if_an_owner_fails(running: Processes, begun: threading.Event) -> None:
    """Before the first round is done: an owner that gave up cannot come any more, and the server would wait for it. (One
    that was killed is another matter: rounds go on without it.)"""
    while not begun.wait(0.2):
        if any((process.poll() or 0) > 0 for process in running.owners.values()):
            running.server.terminate()
            return


def read_records(directory: Path) -> list[RoundRecord]:
    """Of a federation's output directory."""
    lines = (directory / ROUNDS_FILE).read_text(encoding="utf-8").splitlines()
    return [RoundRecord(**{**json.loads(line)}) for line in lines]


def read_adapter(recipe: FederationRecipe) -> NDArray[np.float32]:
    """The global adapter that the server wrote, float32 `[size]`."""
    state = load_file(recipe.training.output_dir / ADAPTER_DIR / WEIGHTS_FILE)
    return plaintext_model(recipe).layout.flatten(state)
