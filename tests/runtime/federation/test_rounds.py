"""The round as a state machine: sums, drop-outs, refusals."""

from __future__ import annotations

import numpy as np
import pytest

from hecompile.errors import FederationError
from tests.runtime.federation.conftest import LAYOUT, World, make_world


def expected(world: World, names: list[str]) -> np.ndarray:
    total = sum(world.updates[name].samples for name in names)
    return sum(world.updates[name].delta.astype(np.float64) * world.updates[name].samples for name in names) / total


def test_a_round_gives_the_weighted_mean_within_its_bound() -> None:
    world = make_world(5)
    before = world.adapter.copy()
    result = world.federation.round(1, world.adapter, world.exchange)
    names = sorted(world.participants)
    error = np.abs(result.mean - expected(world, names))
    assert error.max() <= result.error_bound < 1e-5
    assert result.samples == sum(update.samples for update in world.updates.values())
    assert result.contributors == result.opened_by == tuple(names)
    assert np.array_equal(before, world.adapter)
    assert np.allclose(result.adapter - before, expected(world, names), atol=1e-6)


@pytest.mark.parametrize("gone_before", [(), ("owner-4",), ("owner-0", "owner-3")])
@pytest.mark.parametrize("gone_at_opening", [(), ("owner-1",), ("owner-1", "owner-2")])
def test_drop_outs_are_survived_up_to_the_threshold(
    gone_before: tuple[str, ...], gone_at_opening: tuple[str, ...]
) -> None:
    world = make_world(5, threshold=3)
    exchange = world.scripted(None, world.without(*gone_before), world.without(*gone_at_opening))
    result = world.federation.round(1, world.adapter, exchange)
    left = [name for name in sorted(world.participants) if name not in gone_before]
    assert result.contributors == tuple(left)
    assert np.abs(result.mean - expected(world, left)).max() <= result.error_bound
    assert len(result.opened_by) == 5 - len(gone_at_opening)


@pytest.mark.parametrize("gone", [("owner-1",), ("owner-1", "owner-2")])
def test_who_is_gone_before_the_contributors_are_confirmed_does_not_open(gone: tuple[str, ...]) -> None:
    world = make_world(5, threshold=3)
    result = world.federation.round(1, world.adapter, world.scripted(confirming=world.without(*gone)))
    assert result.contributors == tuple(sorted(world.participants))
    assert set(result.opened_by) == set(world.participants) - set(gone)
    assert np.abs(result.mean - expected(world, sorted(world.participants))).max() <= result.error_bound


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_below_the_threshold_a_round_fails_closed(step: int) -> None:
    world = make_world(5, threshold=4)
    steps = [None] * 4
    steps[step] = world.without("owner-0", "owner-1")
    before = world.adapter.copy()
    with pytest.raises(FederationError, match="it takes 4"):
        world.federation.round(1, world.adapter, world.scripted(*steps[:3], confirming=steps[3]))
    assert np.array_equal(world.adapter, before)
    assert world.federation.round(2, world.moved(2), world.exchange).samples > 0  # the next round is not harmed


def test_a_sum_over_fewer_than_the_minimum_is_refused_by_server_and_participants() -> None:
    world = make_world(5, threshold=3, minimum=5)
    with pytest.raises(FederationError, match="4 owners contributed, but it takes 5"):
        world.federation.round(1, world.adapter, world.scripted(None, world.without("owner-2")))


def test_several_rounds_move_the_adapter_and_tell_the_owners() -> None:
    world = make_world(3, rounds=3)
    told = []

    def exchange(requests):  # type: ignore[no-untyped-def]
        told.extend(message for message in requests.values() if message.kind == "finished")
        return world.exchange(requests)

    final = world.federation.run(world.adapter, exchange)
    moved = 3 * expected(world, sorted(world.participants))
    assert np.allclose(final - world.adapter, moved, atol=1e-5)
    assert len(told) == 3 and told[0].adapter == final.tobytes()


def test_a_round_with_pruning_sends_only_what_the_mask_keeps() -> None:
    pruning = {"start_rate": 0.5, "end_rate": 0.5, "start_round": 1, "end_round": 1}
    world, whole = make_world(3, pruning=pruning), make_world(3)
    result = world.federation.round(1, world.adapter, world.exchange)
    everything = whole.federation.round(1, whole.adapter, whole.exchange)
    saved = 3 * 3 * LAYOUT.size // 2  # owners · bytes · coordinates
    assert everything.bytes_up - result.bytes_up == saved
    assert (result.adapter == 0).sum() == LAYOUT.size // 2
