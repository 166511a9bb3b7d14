"""What breaks the protocol is one clear error, and the global adapter stays as it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from hecompile.errors import FederationError, SecurityError
from hecompile.runtime.federation.protocol.channels import Identity
from hecompile.runtime.federation.protocol.keyring import MemoryKeys
from hecompile.runtime.federation.protocol.layout import Layout
from hecompile.runtime.federation.protocol.messages import Contribution, Message, Opening, Start, SumShare
from hecompile.runtime.federation.protocol.participant import LocalUpdate, Participant
from hecompile.runtime.federation.protocol.server_round import ServerRound
from hecompile.runtime.federation.protocol.settings import Agreement, FederationSection
from tests.runtime.federation.conftest import LAYOUT, World, make_world


def fails(world: World, pattern: str, *steps: Any, number: int = 1, confirming: Any = None) -> None:
    before = world.adapter.copy()
    with pytest.raises(FederationError, match=pattern):
        world.federation.round(number, world.adapter, world.scripted(*steps, confirming=confirming))
    assert np.array_equal(world.adapter, before)


def swap(world: World, name: str, **changes: Any) -> None:
    """One participant that differs from what the federation agreed on."""
    own = world.participants[name]
    identity = changes.pop("identity", own.identity)
    terms = replace(own.terms, **changes)
    world.participants[name] = Participant(
        identity, terms, MemoryKeys(), lambda header, adapter, mask: world.updates[name]
    )


def test_other_lora_shapes() -> None:
    world = make_world()
    swap(world, "owner-1", layout=Layout(((LAYOUT.shapes[0][0], (8, 16)), (LAYOUT.shapes[1][0], (24, 8)))))
    fails(world, "'owner-1' refused: .*other LoRA matrices or shapes")
    with pytest.raises(FederationError, match=r"lora_A.weight is missing, the federation's \[4, 16\]"):
        LAYOUT.flatten({})


@pytest.mark.parametrize("change", [{"threshold": 2}, {"value_range": 2.0}, {"freeze_a": True}, {"max_samples": 32}])
def test_a_server_cannot_change_the_agreement(change: dict[str, Any]) -> None:
    world = make_world()
    section = FederationSection(**{"max_samples": 64, **change})
    swap(world, "owner-1", agreement=Agreement.of(world.federation.terms.agreement.owners, section))
    fails(world, "'owner-1' refused: round 1 is not what 'owner-1' agreed to")


def test_another_mask() -> None:
    pruning = {"start_rate": 0.5, "end_rate": 0.5, "start_round": 1, "end_round": 1}
    world = make_world(pruning=pruning)

    def tampered(requests: Mapping[str, Message]) -> Mapping[str, Message]:
        other = np.flip(world.adapter).astype("<f4").tobytes()
        return world.exchange({name: start.model_copy(update={"adapter": other}) for name, start in requests.items()})

    fails(world, "the pruning mask of 'owner-0' is not the server's", None, tampered)


@pytest.mark.parametrize(
    ("value", "pattern"),
    [(np.nan, "values that are not finite"), (np.inf, "values that are not finite"), (5.0, "beyond the agreed range")],
)
def test_an_update_that_cannot_be_encoded(value: float, pattern: str) -> None:
    world = make_world()
    world.updates["owner-2"].delta[7] = value
    fails(world, f"'owner-2' refused: its update (is|holds) {pattern}")


def test_too_many_samples_and_another_length() -> None:
    world = make_world()
    world.updates["owner-0"] = replace(world.updates["owner-0"], samples=65)
    fails(world, "its number of samples is beyond")
    world = make_world()
    world.updates["owner-0"] = LocalUpdate(np.zeros(3, np.float32), 5)
    fails(world, r"the update has \[3\] values")


def test_a_stranger_and_a_forged_signature() -> None:
    world = make_world()
    swap(world, "owner-1", identity=Identity.generate("owner-1"))
    fails(world, "the round's key of 'owner-1' is not signed by 'owner-1'")
    world = make_world()

    def renamed(requests: Mapping[str, Message]) -> Mapping[str, Message]:
        replies = dict(world.exchange(requests))
        return replies | {"owner-0": replies["owner-1"]}

    fails(world, "'owner-0' sent a message in the name of 'owner-1'", renamed)


def altered(opening: Opening, sender: str, share: bytes) -> Opening:
    return opening.model_copy(update={"shares": {**opening.shares, sender: share}})


@pytest.mark.parametrize("kind", ["bit", "other sender", "other recipient", "short"])
def test_a_forged_share(kind: str) -> None:
    world = make_world()

    def tamper(requests: Mapping[str, Message]) -> Mapping[str, Message]:
        opening = requests["owner-0"]
        assert isinstance(opening, Opening)
        share = opening.shares["owner-1"]
        forged = {
            "bit": share[:-1] + bytes([share[-1] ^ 1]),
            "other sender": opening.shares["owner-2"],
            "other recipient": requests["owner-2"].shares["owner-1"],  # type: ignore[attr-defined]
            "short": share[:5],
        }[kind]
        return world.exchange({**requests, "owner-0": altered(opening, "owner-1", forged)})

    fails(world, "the share of 'owner-1' for 'owner-0' is forged, replayed or of another round", None, None, tamper)


def test_a_share_replayed_from_an_earlier_round() -> None:
    world = make_world()
    kept: dict[str, bytes] = {}

    def listen(requests: Mapping[str, Message]) -> Mapping[str, Message]:
        opening = requests["owner-0"]
        assert isinstance(opening, Opening)
        kept.update(opening.shares)
        return world.exchange(requests)

    def replay(requests: Mapping[str, Message]) -> Mapping[str, Message]:
        opening = requests["owner-0"]
        assert isinstance(opening, Opening)
        return world.exchange({**requests, "owner-0": altered(opening, "owner-1", kept["owner-1"])})

    world.federation.round(1, world.adapter, world.scripted(None, None, listen))
    world.adapter = world.moved(2)
    fails(world, "forged, replayed or of another round", None, None, replay, number=2)


@pytest.mark.parametrize("answering", [3, 5])
def test_a_wrong_share_of_the_sum_is_noticed_with_and_without_surplus(answering: int) -> None:
    world = make_world(5, threshold=3)

    def lie(requests: Mapping[str, Message]) -> Mapping[str, Message]:
        replies = dict(list(world.exchange(requests).items())[:answering])
        share = np.frombuffer(replies["owner-1"].share, "<u2").copy()  # type: ignore[attr-defined]
        share[11] ^= 1
        return {**replies, "owner-1": SumShare(name="owner-1", share=share.tobytes())}

    fails(world, "contradict each other|no sum of|is noise", None, None, lie)


def test_shares_are_revealed_for_one_set_of_contributors_only() -> None:
    world = make_world(5, threshold=3)

    def twice(requests: Mapping[str, Message]) -> Mapping[str, Message]:
        replies = world.exchange(requests)
        fewer = {
            name: opening.model_copy(update={"shares": {k: v for k, v in opening.shares.items() if k != "owner-4"}})  # type: ignore[attr-defined]
            for name, opening in requests.items()
        }
        for refusal in world.exchange(fewer).values():
            assert refusal.kind == "refusal" and "the list of contributors of" in refusal.reason  # type: ignore[attr-defined]
        again = world.exchange(requests)
        assert again == replies  # the same set, the same share
        return replies

    world.federation.round(1, world.adapter, world.scripted(None, None, twice))


def test_a_participant_opens_nothing_below_the_minimum_whatever_the_server_says() -> None:
    world = make_world(5, threshold=3)

    def one(requests: Mapping[str, Message]) -> Mapping[str, Message]:
        alone = {n: o.model_copy(update={"shares": {"owner-1": o.shares["owner-1"]}}) for n, o in requests.items()}  # type: ignore[attr-defined]
        return world.exchange(alone)

    fails(world, "1 owners contributed, but it takes 3", None, None, one)


def test_a_round_is_contributed_to_once_and_never_again() -> None:
    world = make_world(threshold=2)

    def twice(requests: Mapping[str, Message]) -> Mapping[str, Message]:
        replies = world.exchange(requests)
        assert world.exchange(requests) == replies  # to the same participants, the same bytes
        fewer = {name: start.model_copy(update={"adverts": start.adverts[:2]}) for name, start in requests.items()}  # type: ignore[attr-defined]
        for refusal in (world.exchange(fewer)[name] for name in ("owner-0", "owner-1")):
            assert refusal.kind == "refusal" and "contributed to before" in refusal.reason  # type: ignore[attr-defined]
        return replies

    world.federation.round(1, world.adapter, world.scripted(None, twice, None))
    fails(world, "round numbers only grow")


def test_contributions_of_another_length_or_without_all_shares() -> None:
    world = make_world()

    def shorter(requests: Mapping[str, Message]) -> Mapping[str, Message]:
        replies = dict(world.exchange(requests))
        own = replies["owner-0"]
        assert isinstance(own, Contribution)
        return {**replies, "owner-0": own.model_copy(update={"update": own.update[:-3]})}

    fails(world, "another adapter or mask", None, shorter)

    def fewer(requests: Mapping[str, Message]) -> Mapping[str, Message]:
        replies = dict(world.exchange(requests))
        own = replies["owner-0"]
        assert isinstance(own, Contribution)
        return {**replies, "owner-0": own.model_copy(update={"shares": {}})}

    fails(make_world_like(world), "did not send one share to each", None, fewer)


def make_world_like(world: World) -> World:
    """The same participants, after a failed round: the next number."""
    fresh = make_world()
    world.participants.clear()
    world.participants.update(fresh.participants)
    return fresh


def test_thresholds_that_protect_nothing() -> None:
    for section, reason in (
        ({"threshold": 2}, "not more than half"),
        ({"threshold": 5}, "beyond"),
        ({"minimum": 1}, "greater than or equal to 2"),
    ):
        with pytest.raises(ValidationError, match=reason):
            Agreement.of([f"o{i}" for i in range(4)], FederationSection(**section))


def test_no_message_and_no_log_holds_a_key(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that leaves a participant is searched for the key that it drew."""
    from hecompile.he.aggregation import scheme as aggregation

    drawn: list[np.ndarray] = []
    original = aggregation._small
    monkeypatch.setattr(aggregation, "_small", lambda random, count: drawn.append(original(random, count)) or drawn[-1])
    world, sent = make_world(), []

    def exchange(requests: Mapping[str, Message]) -> Mapping[str, Message]:
        from hecompile.runtime.federation.protocol.messages import to_bytes

        replies = world.exchange(requests)
        sent.extend(to_bytes(message) for message in [*requests.values(), *replies.values()])
        return replies

    world.federation.round(1, world.adapter, exchange)
    keys = [key for key in drawn if key.size == world.federation.terms.agreement.parameters().ring.lattice_dim]
    assert len(keys) == 3
    for key in keys:
        for pattern in (key[:16].astype(dtype).tobytes() for dtype in ("<i1", "<i2", "<i4", "<f4", "<f8")):
            assert not any(pattern in message for message in sent)
    assert not caplog.records


def test_secret_objects_are_not_serialized() -> None:
    import copy
    import pickle

    from hecompile.he.aggregation.scheme import keygen

    world = make_world()
    for secret in (keygen(world.federation.terms.agreement.parameters()), MemoryKeys(), world.identities["owner-0"]):
        for refused in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(SecurityError, match="cannot be copied, pickled"):
                refused(secret)
        assert repr(secret) == f"<{type(secret).__name__}>"


def test_phases_out_of_order() -> None:
    world = make_world()
    current = ServerRound(world.federation.terms, 1, world.adapter)
    for phase in (current.open, current.finish):
        with pytest.raises(FederationError, match="after it was"):
            phase({})
    empty = Start(header=current.header.model_dump(mode="json"), adverts=[], adapter=b"")
    with pytest.raises(FederationError, match="0 owners take part"):
        world.participants["owner-0"].answer(empty)
