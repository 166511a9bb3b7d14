"""A server that lies to the owners, alone or with some of them: what it would learn one update from is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from hecompile.errors import FederationError
from hecompile.models import TINY_LLAMA
from hecompile.runtime.federation.local_model import LocalModel
from hecompile.runtime.federation.owner import save_finished
from hecompile.runtime.federation.protocol.keyring import DirectoryKeys, MemoryKeys, RoundKeys
from hecompile.runtime.federation.protocol.messages import (
    Confirmation,
    Contributors,
    Finished,
    Message,
    Opening,
    SumShare,
)
from hecompile.runtime.federation.protocol.participant import Participant
from hecompile.runtime.federation.protocol.rounds import Federation
from hecompile.runtime.federation.protocol.server_round import ServerRound
from hecompile.runtime.federation.protocol.settings import Agreement, FederationSection
from hecompile.runtime.federation.recipe import load_federation
from tests.runtime.federation.conftest import LAYOUT, World, make_world


def contributed(world: World, number: int = 1) -> ServerRound:
    """A round in which all owners have contributed."""
    current = ServerRound(world.federation.terms, number, world.adapter, world.federation.identifier)
    owners = list(world.participants)
    current.start(world.exchange(dict.fromkeys(owners, current.invitation())))
    current.close(world.exchange(dict.fromkeys(owners, current.start_message())))
    return current


class Colluder:
    """An owner that signs whatever the server wants, and gives its share of every sum."""

    def __init__(self, participant: Participant) -> None:
        self.participant = participant

    def confirms(self, message: Contributors) -> bytes:
        _, transcript = self.participant._transcript(message)
        return self.participant.identity.sign_contributors(transcript.context, message.names)


def shares_for(
    world: World, current: ServerRound, names: list[str], honest: list[str], colluders: list[Colluder]
) -> int:
    """How many shares of the sum over `names` the server gets, when it shows that set to `honest` alone."""
    message = current.contributors_message().model_copy(update={"names": names})
    replies = world.exchange(dict.fromkeys(honest, message))
    signed = {name: reply.signature for name, reply in replies.items() if isinstance(reply, Confirmation)}
    signed |= {one.participant.name: one.confirms(message) for one in colluders}
    openings = {
        name: Opening(
            header=current.pending.header,
            adverts=current.pending.adverts,
            shares={sender: current.pending.shares[sender][name] for sender in names},
            confirmations=signed,
        )
        for name in world.participants
    }
    given = world.exchange({name: openings[name] for name in honest})
    return len(colluders) + sum(isinstance(reply, SumShare) for reply in given.values())


@pytest.mark.parametrize(("owners", "threshold"), [(5, None), (5, 3), (4, None)])
def test_two_sets_of_one_round_are_not_both_opened_by_a_server_with_one_owner(
    owners: int, threshold: int | None
) -> None:
    """The default holds for every way to divide the owners; half of them and one is not enough, as the bound says."""
    names = [f"owner-{index}" for index in range(owners)]
    both = False
    for sides in product((0, 1), repeat=owners - 1):
        world = make_world(owners, threshold=threshold)
        needed = world.federation.terms.agreement.threshold
        current = contributed(world)
        colluder = Colluder(world.participants[names[0]])
        divided = [[name for name, side in zip(names[1:], sides, strict=True) if side == which] for which in (0, 1)]
        sets = (names[:needed], names[: needed + 1])
        counts = [
            shares_for(world, current, contributors, honest, [colluder])
            for contributors, honest in zip(sets, divided, strict=True)
        ] if needed < owners else [0]  # fmt: skip
        both |= min(counts) >= needed
    colluding = 1
    assert both == (not needed > (owners + colluding) / 2)


@pytest.mark.parametrize("owners", range(2, 129))
def test_the_default_threshold_holds_for_a_third_of_the_owners(owners: int) -> None:
    threshold = Agreement.of([f"o{index}" for index in range(owners)], FederationSection()).threshold
    assert threshold == 2 * owners // 3 + 1 <= owners
    assert threshold > (owners + owners // 3) / 2


def test_an_owner_signs_one_set_and_opens_no_other() -> None:
    world = make_world(5, threshold=3)
    current = contributed(world)
    message = current.contributors_message()
    one = world.participants["owner-1"]
    first = one.answer(message)
    assert one.answer(message) == first
    for names in (message.names[:4], [*message.names, "owner-1"], message.names[:2], [*message.names[:4], "eve"]):
        with pytest.raises(FederationError, match=r"confirmed with other|twice|it takes 3"):
            one.answer(message.model_copy(update={"names": names}))


def test_a_share_is_given_for_enough_signatures_over_the_same_set_only() -> None:
    world = make_world(5, threshold=3)
    current = contributed(world)
    confirmations = world.exchange(dict.fromkeys(world.participants, current.contributors_message()))
    opening = current.open(confirmations)["owner-1"]
    one = world.participants["owner-1"]
    signatures = opening.confirmations

    def refused(pattern: str, opening: Opening) -> None:
        with pytest.raises(FederationError, match=pattern):
            one.answer(opening)

    few = dict(list(signatures.items())[:2])
    refused("2 owners confirmed the contributors, but it takes 3", opening.model_copy(update={"confirmations": few}))
    swapped = {**signatures, "owner-2": signatures["owner-3"]}
    refused("'owner-2' is not signed by 'owner-2'", opening.model_copy(update={"confirmations": swapped}))
    stranger = {**signatures, "eve": signatures["owner-3"]}
    refused("'eve' confirms", opening.model_copy(update={"confirmations": stranger}))
    less = {name: share for name, share in opening.shares.items() if name != "owner-4"}
    refused("is not signed", opening.model_copy(update={"shares": less}))
    assert isinstance(one.answer(opening), SumShare)


def test_a_share_is_not_given_before_the_own_confirmation() -> None:
    world = make_world(5, threshold=3)
    current = contributed(world)
    asked = [name for name in world.participants if name != "owner-1"]
    openings = current.open(world.exchange(dict.fromkeys(asked, current.contributors_message())))
    shares = {sender: shares["owner-1"] for sender, shares in current.pending.shares.items()}
    with pytest.raises(FederationError, match="never begun"):
        world.participants["owner-1"].answer(openings["owner-0"].model_copy(update={"shares": shares}))


def test_owners_are_not_shown_different_adapters() -> None:
    """Where one sees another adapter, it refuses; announced in another header, it has no part in the others' round."""
    world = make_world(3)

    def another(requests: Mapping[str, Message]) -> Mapping[str, Message]:
        other = world.moved(1).astype("<f4").tobytes()
        return world.exchange({**requests, "owner-2": requests["owner-2"].model_copy(update={"adapter": other})})

    with pytest.raises(FederationError, match="the adapter sent to 'owner-2' is not the one"):
        world.federation.round(1, world.adapter, world.scripted(None, another))


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"\x00" * 4, np.full(LAYOUT.size, np.nan, "<f4").tobytes()])
def test_a_last_adapter_that_is_none_is_not_saved(tmp_path: Path, content: bytes) -> None:
    loaded = load_federation(TINY_LLAMA.parent / "recipes/federation.yaml", [f"training.output_dir={tmp_path}"])
    local = cast("LocalModel", SimpleNamespace(layout=LAYOUT))
    with pytest.raises(FederationError, match=r"with an adapter of .* bytes that is not the federation's"):
        save_finished(loaded, "owner-1", local, Finished(adapter=content, rounds=1))
    assert not list(tmp_path.iterdir())


Restart = Callable[[World], None]


def of_directory(folder: Path) -> tuple[Callable[[str], RoundKeys], Restart]:
    def restart(world: World) -> None:
        for name, participant in list(world.participants.items()):
            world.participants[name] = Participant(
                participant.identity, participant.terms, DirectoryKeys(folder / name), participant._train
            )

    return lambda name: DirectoryKeys(folder / name), restart


@pytest.fixture(params=["memory", "directory"])
def keys(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Callable[[str], RoundKeys], Restart]:
    if request.param == "memory":
        return lambda name: MemoryKeys(), lambda world: None
    return of_directory(tmp_path)


def test_no_adapter_is_trained_from_twice(keys: tuple[Callable[[str], RoundKeys], Restart]) -> None:
    """Sums over sets that differ by one, from one adapter, would give that one's update: also after a restart."""
    make, restart = keys
    world = make_world(5, keys=make)
    result = world.federation.round(1, world.adapter, world.exchange)
    restart(world)
    with pytest.raises(FederationError, match="round 2 starts from the adapter of an earlier round"):
        world.federation.round(2, world.adapter, world.scripted(world.without("owner-3")))
    with pytest.raises(FederationError, match="round numbers only grow"):
        world.federation.round(1, result.adapter, world.exchange)
    assert world.federation.round(2, result.adapter, world.exchange).samples == result.samples
    restart(world)
    with pytest.raises(FederationError, match="round 3 starts from the adapter of an earlier round"):
        world.federation.round(3, world.adapter, world.exchange)


def test_another_federation_does_not_begin_with_an_owner_that_did_not_start_anew(tmp_path: Path) -> None:
    world = make_world(3, keys=lambda name: DirectoryKeys(tmp_path / name))
    result = world.federation.round(1, world.adapter, world.exchange)
    terms, other = world.federation.terms, world.moved(1)
    with pytest.raises(FederationError, match=r"another federation than the one that this owner was in$"):
        Federation(terms).round(1, other, world.exchange)

    def anew(**options: bool) -> World:
        fresh = make_world(3)
        for name, participant in world.participants.items():
            fresh.participants[name] = Participant(
                participant.identity, terms, DirectoryKeys(tmp_path / name, **options), participant._train
            )
        return fresh

    begun = anew(fresh=True)
    with pytest.raises(FederationError, match="the adapter of an earlier round"):
        Federation(terms).round(1, world.adapter, begun.exchange)
    Federation(terms).round(1, other, begun.exchange)
    with pytest.raises(FederationError, match="another federation"):  # one per start
        Federation(terms).round(1, result.adapter, begun.exchange)
    assert np.isfinite(Federation(terms).round(1, world.adapter, anew(fresh=True, forget=True).exchange).mean).all()
