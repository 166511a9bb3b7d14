"""A fleet that does not fit is refused at once, and what is waited for is said; the cluster is made up."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from hecompile.errors import InputError
from hecompile.runtime.worker.servers.fleet import FleetFile
from hecompile.runtime.worker.servers.fleet_room import await_workers, check_room


def fleet(shards: int, replicas: int, cpus: float = 1.0, gpus: float = 0.0) -> FleetFile:
    return FleetFile(bundle=Path("b"), shards=shards, replicas=replicas, cpus_per_replica=cpus, gpus_per_replica=gpus)


@pytest.mark.parametrize(
    ("asked", "machines"),
    [
        (fleet(2, 2), [{"CPU": 4.0}]),
        (fleet(2, 2), [{"CPU": 3.0}, {"CPU": 1.0, "memory": 1e9}]),
        (fleet(1, 3, 0.1), [{"CPU": 0.3}]),
        (fleet(1, 2, 1, 1), [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 4.0}]),
        (fleet(4, 4, 0), [{}]),
    ],
)
def test_a_fleet_that_fits_is_taken(asked: FleetFile, machines: list[dict[str, float]]) -> None:
    check_room(asked, machines)


@pytest.mark.parametrize(
    ("asked", "machines", "message"),
    [
        (fleet(2, 2), [{"CPU": 2.0}], "4 replicas with 1 CPU each, .* room for 2 of them: 2 CPUs and 0 GPUs on 1 machine"),
        (fleet(1, 1, 4), [{"CPU": 3.0}, {"CPU": 3.0}], "1 replicas with 4 CPUs each, .* room for 0 .*6 CPUs .*2 machines"),
        (fleet(1, 1, 1, 1), [{"CPU": 8.0}], "1 CPU and 1 GPU each, .* room for 0"),
        (fleet(1, 2, 1, 1), [{"CPU": 1.0, "GPU": 2.0}, {"CPU": 8.0}], "room for 1"),
        (fleet(1, 1), [], "room for 0 of them: 0 CPUs and 0 GPUs on 0 machines"),
    ],
)
def test_a_fleet_that_does_not_fit_is_refused(
    asked: FleetFile, machines: list[dict[str, float]], message: str
) -> None:
    with pytest.raises(InputError, match=message + ".*Lower shards, replicas, cpus_per_replica"):
        check_room(asked, machines)


def waiting(counts: Callable[[], int], state: str = "RUNNING", message: str = "") -> list[str]:
    told: list[str] = []
    now = itertools.count(0.0, 2.0)
    await_workers(counts, 4, lambda: {"shard-0": (state, message)}, told.append, lambda: next(now), lambda _: None)
    return told


def test_what_is_waited_for_is_said() -> None:
    numbers = iter([0, 1, 1, 1, 1, 1, 1, 4])
    assert waiting(lambda: next(numbers)) == ["waiting for workers: 1 of 4 have started"] * 2


def test_workers_that_do_not_come_are_given_up() -> None:
    with pytest.raises(InputError, match="3 of 4 workers started within 120 s: see Ray's logs"):
        waiting(lambda: 3)
    with pytest.raises(InputError, match="4 of 4 workers"):
        waiting(lambda: 4, "DEPLOYING")


def test_an_application_that_failed_is_named_with_its_reason() -> None:
    with pytest.raises(InputError, match=r"cannot start shard-0: no bundle at x\?\[31m") as caught:
        waiting(lambda: 0, "DEPLOY_FAILED", "no bundle at x\x1b[31m" + "y" * 5000)
    assert len(str(caught.value)) < 1200


def test_an_interrupt_ends_the_wait() -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        waiting(interrupted)
