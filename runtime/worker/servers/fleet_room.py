"""Compare what a fleet asks for with what a cluster has, and wait for its workers; nothing of Ray is needed here."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from hecompile.errors import InputError
from hecompile.foreign import printable

CPU, GPU = "CPU", "GPU"
_START_SECONDS = 120.0
_TELL_SECONDS = 5.0


class Asks(Protocol):
    """Name what of a fleet's file decides how much room it takes."""

    @property
    def shards(self) -> int: ...

    @property
    def replicas(self) -> int: ...

    @property
    def cpus_per_replica(self) -> float: ...

    @property
    def gpus_per_replica(self) -> float: ...


def check_room(fleet: Asks, machines: Sequence[Mapping[str, float]]) -> None:
    """Raise InputError unless every replica has a place: a replica lies on one machine, a machine may have several.

    machines: the resources of each, `CPU` and `GPU` among them. Without this check Ray waits for machines to come.
    """
    wanted = fleet.shards * fleet.replicas
    places = sum(_places(fleet, machine, wanted) for machine in machines)
    if places >= wanted:
        return
    asked = f"{wanted} replicas with {_amount(fleet.cpus_per_replica, 'CPU')}"
    if fleet.gpus_per_replica:
        asked += f" and {_amount(fleet.gpus_per_replica, 'GPU')}"
    has = [_amount(sum(machine.get(kind, 0.0) for machine in machines), kind) for kind in (CPU, GPU)]
    raise InputError(
        f"the fleet asks for {asked} each, and the cluster has room for {places} of them: {' and '.join(has)} on "
        f"{_amount(len(machines), 'machine')}. Lower shards, replicas, cpus_per_replica or gpus_per_replica, or add machines"
    )


def await_workers(
    reporting: Callable[[], int],
    wanted: int,
    applications: Callable[[], Mapping[str, tuple[str, str]]],
    tell: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Wait until the workers report and all applications run, and tell every few seconds what is waited for.

    Args:
        reporting: counts the workers that report.
        wanted: how many there are to be.
        applications: the state and message of each application of Ray Serve, by name.
        tell: takes the line.
        clock, sleep: for tests.

    Raises:
        InputError: an application has failed, or they do not start within two minutes.
    """
    start = told = clock()
    while True:
        there, states = reporting(), applications()
        for name, (state, message) in states.items():
            if state == "DEPLOY_FAILED":
                raise InputError(f"Ray Serve cannot start {name}: {printable(message) or 'see its logs'}")
        if there >= wanted and all(state == "RUNNING" for state, _ in states.values()):
            return
        now = clock()
        if now - start > _START_SECONDS:
            raise InputError(
                f"{there} of {wanted} workers started within {_START_SECONDS:g} s: see Ray's logs, and whether other "
                "programs have its CPUs and GPUs"
            )
        if now - told >= _TELL_SECONDS:
            tell(f"waiting for workers: {there} of {wanted} have started")
            told = now
        sleep(0.2)


def _places(fleet: Asks, machine: Mapping[str, float], most: int) -> int:
    fits = [most]
    for kind, each in ((CPU, fleet.cpus_per_replica), (GPU, fleet.gpus_per_replica)):
        if each > 0:
            fits.append(int(machine.get(kind, 0.0) / each + 1e-9))  # 0.3 / 0.1 is 2.99…
    return min(fits)


def _amount(number: float, unit: str) -> str:
    return f"{number:g} {unit}{'' if number == 1 else 's'}"
