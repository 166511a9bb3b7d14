"""A federation whose server and owners are killed goes on from there, and is then the one that it would have been."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from hecompile.errors import FederationError, InputError
from hecompile.files import only_writer
from hecompile.models import TINY_LLAMA
from hecompile.runtime.federation.launch import check_output
from hecompile.runtime.federation.owner import join
from hecompile.runtime.federation.protocol.keyring import DirectoryKeys
from hecompile.runtime.federation.protocol.messages import Message
from hecompile.runtime.federation.protocol.participant import LocalUpdate, Participant
from hecompile.runtime.federation.protocol.rounds import Exchange, Federation
from hecompile.runtime.federation.protocol.settings import RoundHeader
from hecompile.runtime.federation.recipe import FederationRecipe, load_federation
from hecompile.runtime.federation.records import RoundLog, read_records
from hecompile.runtime.federation.server import serve
from hecompile.runtime.federation.state import ServerState, begin_owner, check_owner, is_interrupted
from hecompile.runtime.wire.events import emit
from tests.runtime.federation.conftest import World, make_world
from tests.runtime.federation.test_rounds import expected

RECIPE = TINY_LLAMA.parent / "recipes" / "federation.yaml"
ROUNDS, EXCHANGES = 2, 4
PRUNING = {"start_rate": 0.3, "end_rate": 0.5, "start_round": 1, "end_round": 2}


class Killed(BaseException):
    """What no handler catches."""


def recipe(out: Path, *more: str) -> FederationRecipe:
    return load_federation(RECIPE, [f"training.output_dir={out}", f"federation.rounds={ROUNDS}", *more])


def restarted(world: World, folder: Path, trained: Counter[tuple[str, int]]) -> None:
    """Participants in new processes, which count how often they train."""

    def train(name: str) -> Callable[[RoundHeader, NDArray[np.float32], NDArray[np.bool_]], LocalUpdate]:
        def counting(header: RoundHeader, adapter: NDArray[np.float32], mask: NDArray[np.bool_]) -> LocalUpdate:
            trained[name, header.number] += 1
            return world.updates[name]

        return counting

    for name, identity in world.identities.items():
        keys = DirectoryKeys(folder / name)
        world.participants[name] = Participant(identity, world.federation.terms, keys, train(name))


def run(world: World, loaded: FederationRecipe, exchange: Exchange, *, resume: bool) -> NDArray[np.float32]:
    """Run as `server.run_rounds` does, from `world.adapter`."""
    out = loaded.training.output_dir
    state = ServerState.load(loaded) if resume else ServerState.begin(loaded, world.adapter)
    with RoundLog(out, state, lambda event, /, **fields: None, resume=resume) as log:
        return Federation(world.federation.terms, state.federation).run(
            state.adapter, exchange, log.add, complete=state.complete, pending=state.pending, save=state.save
        )


def killed_at(world: World, step: int, *, after: bool) -> Exchange:
    """Every process is killed in exchange `step`: before an owner has the message, or when all have answered."""
    steps = iter(range(1000))

    def exchange(requests: Mapping[str, Message]) -> Mapping[str, Message]:
        last = next(steps) == step
        if last and not after:
            raise Killed
        replies = world.exchange(requests)
        if last:
            raise Killed
        return replies

    return exchange


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", range(ROUNDS * EXCHANGES + 1))
def test_a_federation_killed_anywhere_goes_on_and_loses_nothing(tmp_path: Path, step: int, after: bool) -> None:
    world, trained, loaded = make_world(4, rounds=ROUNDS, pruning=PRUNING), Counter[tuple[str, int]](), recipe(tmp_path)
    whole = make_world(4, rounds=ROUNDS, pruning=PRUNING)
    through = whole.federation.run(whole.adapter, whole.exchange)
    restarted(world, tmp_path / "keys", trained)
    with pytest.raises(Killed):
        run(world, loaded, killed_at(world, step, after=after), resume=False)
    assert is_interrupted(tmp_path) == (step < ROUNDS * EXCHANGES)
    restarted(world, tmp_path / "keys", trained)
    final = run(world, loaded, world.exchange, resume=True)
    assert np.allclose(final, through, atol=1e-6)  # the noise of the encryption is drawn anew
    assert [record.round for record in read_records(tmp_path)] == [1, 2]
    assert all(len(record.contributors) == 4 for record in read_records(tmp_path))
    assert trained == {(name, number): 1 for name in world.participants for number in (1, 2)}
    assert not is_interrupted(tmp_path)


@pytest.mark.parametrize("number", range(1, 3 * ROUNDS + 1))
@pytest.mark.parametrize("written", [False, True])
def test_a_server_killed_while_it_writes_its_state_goes_on(
    tmp_path: Path, number: int, written: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every write, before it and after it; the first makes it a federation."""
    world, trained, loaded = make_world(4, rounds=ROUNDS), Counter[tuple[str, int]](), recipe(tmp_path)
    restarted(world, tmp_path / "keys", trained)
    original, calls = ServerState._write, iter(range(1, 100))

    def dying(self: ServerState, **changes: object) -> None:
        last = next(calls) == number + 1
        if not last or written:
            original(self, **changes)
        if last:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(ServerState, "_write", dying)
        with pytest.raises(Killed):
            run(world, loaded, world.exchange, resume=False)
    restarted(world, tmp_path / "keys", trained)
    final = run(world, loaded, world.exchange, resume=True)
    assert np.allclose(final - world.adapter, ROUNDS * expected(world, sorted(world.participants)), atol=1e-5)
    assert [record.round for record in read_records(tmp_path)] == [1, 2]
    assert set(trained.values()) == {1}


def test_one_owner_killed_in_its_training_trains_again_and_is_in_the_sum(tmp_path: Path) -> None:
    world, trained, loaded = make_world(4, rounds=ROUNDS, threshold=3), Counter[tuple[str, int]](), recipe(tmp_path)
    restarted(world, tmp_path / "keys", trained)

    def dies(header: RoundHeader, adapter: NDArray[np.float32], mask: NDArray[np.bool_]) -> LocalUpdate:
        raise Killed

    world.participants["owner-2"]._train = dies
    with pytest.raises(Killed):
        run(world, loaded, world.exchange, resume=False)
    restarted(world, tmp_path / "keys", trained)
    run(world, loaded, world.exchange, resume=True)
    assert all(len(record.contributors) == 4 for record in read_records(tmp_path))
    assert trained["owner-0", 1] == trained["owner-2", 1] == 1


def test_contributors_stay_settled_where_others_would_answer_later(tmp_path: Path) -> None:
    """The set was signed before the server died; an owner that is back must not make it another one."""
    world, trained, loaded = make_world(4, rounds=1, threshold=3), Counter[tuple[str, int]](), recipe(tmp_path)
    restarted(world, tmp_path / "keys", trained)

    def exchange(requests: Mapping[str, Message]) -> Mapping[str, Message]:
        kind = next(iter(requests.values())).kind
        if kind == "opening":
            raise Killed
        return (world.without("owner-3") if kind == "start" else world.exchange)(requests)

    with pytest.raises(Killed):
        run(world, loaded, exchange, resume=False)
    restarted(world, tmp_path / "keys", trained)
    final = run(world, loaded, world.exchange, resume=True)
    assert read_records(tmp_path)[0].contributors == ["owner-0", "owner-1", "owner-2"]
    assert np.allclose(final - world.adapter, expected(world, ["owner-0", "owner-1", "owner-2"]), atol=1e-5)


def begun(tmp_path: Path) -> FederationRecipe:
    loaded = recipe(tmp_path)
    tmp_path.mkdir(exist_ok=True)
    ServerState.begin(loaded, np.ones(3, np.float32)).advance(1, np.ones(3, np.float32))
    begin_owner(loaded, "owner-1")
    return loaded


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("federation.threshold=3", "federation.threshold was 2 and is now 3"),
        ("training.learning_rate=0.1", "training.learning_rate was 0.004 and is now 0.1"),
        ("federation.rounds=4", "federation.rounds was 2 and is now 4"),
        ("federation.pruning=null", "federation.pruning was not there and is now None"),
        ("sequence_buckets=[32,64]", "sequence_buckets.1 was 48 and is now 64"),
    ],
)
def test_another_recipe_is_refused_by_server_and_owner(tmp_path: Path, change: str, named: str) -> None:
    begun(tmp_path)
    for check in (
        ServerState.load,
        lambda other: check_owner(other, "owner-1"),
        lambda other: check_output(other, True),
    ):
        with pytest.raises(InputError, match=named):
            check(recipe(tmp_path, change))


def test_what_may_differ_and_what_there_is_to_resume(tmp_path: Path) -> None:
    loaded = begun(tmp_path)
    ServerState.load(recipe(tmp_path, "reply_timeout=9", "training.overwrite_output_dir=false"))
    assert is_interrupted(tmp_path)
    for check in (lambda: ServerState.load(recipe(tmp_path / "x")), lambda: check_owner(loaded, "owner-2")):
        with pytest.raises(InputError, match="nothing to resume"):
            check()
    ServerState.load(loaded).advance(ROUNDS, np.ones(3, np.float32))
    check_output(loaded, True)  # the owners have no copy of the adapter yet
    for folder in (tmp_path, *(tmp_path / name for name in loaded.names)):
        (folder / "adapter").mkdir(parents=True)
    with pytest.raises(InputError, match=r"is complete \(2 rounds\), there is nothing to resume"):
        check_output(loaded, True)
    (tmp_path / "federation.state").write_bytes(b"\x00" * 20)
    with pytest.raises(InputError, match=r"federation\.state is damaged"):
        ServerState.load(loaded)
    assert not is_interrupted(tmp_path)


def test_an_interrupted_one_is_not_replaced_unasked(tmp_path: Path) -> None:
    begun(tmp_path)
    (tmp_path / "rounds.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"was interrupted: go on with --resume, choose another directory"):
        check_output(recipe(tmp_path, "training.overwrite_output_dir=false"), False)


def test_one_that_is_running_is_neither_resumed_nor_called_interrupted(tmp_path: Path) -> None:
    loaded = begun(tmp_path)
    for held in (tmp_path, tmp_path / "keys"):
        for resume in (False, True):
            with only_writer(held, folder=True):
                with pytest.raises(InputError, match=r"training\.output_dir .* is being written by another process"):
                    check_output(loaded, resume)
                if held == tmp_path:
                    with pytest.raises(InputError, match="is being written by another process"):
                        serve(loaded, {}, 0, emit, resume=resume)
    check_output(loaded, True)


def test_two_sides_of_one_owner_are_refused_wherever_they_write(tmp_path: Path) -> None:
    loaded, keys = begun(tmp_path / "out"), tmp_path / "keys"
    elsewhere = recipe(tmp_path / "elsewhere")
    with only_writer(keys / "rounds"):
        for other, resume in ((loaded, True), (loaded, False), (elsewhere, False)):
            with pytest.raises(InputError, match=r"the private folder .*keys is being written by another process"):
                join(other, "owner-1", {}, keys, "tcp://127.0.0.1:9", resume=resume)
    assert {path.name for path in keys.iterdir()} == {"identity.key"} and not (tmp_path / "elsewhere").exists()


def test_a_pending_round_of_another_adapter_is_refused(tmp_path: Path) -> None:
    world, loaded = make_world(4, rounds=ROUNDS), recipe(tmp_path)
    restarted(world, tmp_path / "keys", Counter())
    with pytest.raises(Killed):
        run(world, loaded, killed_at(world, 1, after=False), resume=False)
    state = ServerState.load(loaded)
    with pytest.raises(FederationError, match="was begun with another adapter"):
        world.federation.round(1, world.moved(1), world.exchange, pending=state.pending)
