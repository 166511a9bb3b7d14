"""Send each request to the least busy of several workers of a plan, and to another when that one fails.

A worker may hold some of the plan's circuits only (a shard): it says which when it is first connected, and is asked for no
other. The workers keep no state, so a request may be sent any number of times: it is always the same ciphertext, and every
worker answers with the same bytes. Time is measured on the monotonic clock, so that a clock that is set does no harm.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import ChainMap
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from typing import TypeVar, cast

import numpy as np

from hecompile.errors import WorkerError, WorkerUnavailableError
from hecompile.runtime.transports.base import Answer, Transport
from hecompile.runtime.transports.open_connection import open_connection
from hecompile.runtime.wire.protocol import CircuitInfo, WorkerInfo

Result = TypeVar("Result")
MOST_DISTRUSTED = 2
"""Workers caught with a wrong reply before a session ends, however many others there are."""

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class RetryPolicy:
    """Say how often a request is sent, and how long to wait before it is sent again.

    Attributes:
        attempts: how often at most, over all workers.
        first_wait, longest_wait: seconds. Each wait is twice the one before it, less up to a half at random, so that clients
            of a restarted worker do not all come back at once.
    """

    attempts: int = 6
    first_wait: float = 0.5
    longest_wait: float = 30.0

    def wait(self, failures: int) -> float:
        """Return the seconds to wait after `failures` failures."""
        longest = min(self.longest_wait, self.first_wait * 2.0 ** min(failures - 1, 30))
        return longest * random.uniform(0.5, 1.0)  # noqa: S311  no secret


@dataclass
class _Replica:
    name: str
    connect: Callable[[], Transport]
    transport: Transport | None = None  # once it has passed the known-answer test
    circuits: Mapping[str, CircuitInfo] | None = None  # once it has said hello; a look-up may ask the worker
    holds: dict[str, bool] = field(default_factory=dict)  # circuit → whether it has it, as far as known
    in_flight: int = 0
    failures: int = 0  # since it last answered
    retry_at: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Replicas:
    """Spread requests over several transports, each of which takes several requests at once.

    Args:
        workers: name → function that makes a transport to it; each worker says hello and passes the known-answer test before
            its first request.
        policy: attempts and waits.
        discover: returns workers as `workers` has them; called after a failure to find new ones, such as the replacement of
            one that died. May raise WorkerUnavailableError.
        leave_bad: whether a worker that breaks the protocol, computes known answers wrongly or refuses a request is left for
            another; else that ends the request.
        sleep: for tests.
    """

    concurrent = True

    def __init__(
        self,
        workers: Mapping[str, Callable[[], Transport]],
        policy: RetryPolicy | None = None,
        discover: Callable[[], Mapping[str, Callable[[], Transport]]] | None = None,
        leave_bad: bool = False,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._leave_bad = leave_bad
        self._policy = policy or RetryPolicy()
        self._replicas = [_Replica(name, connect) for name, connect in workers.items()]
        self._lock = threading.Lock()
        self._sleep = sleep
        self._discover = discover
        self._distrusted: set[str] = set()
        self._directory_answers = True
        self._plan_id = ""

    def hello(self, plan_id: str) -> WorkerInfo:
        """Connect to every worker that answers, and at least one; returns the circuits of all. See `Transport.hello`.

        A worker that does not answer now is connected when it is needed.
        """
        self._plan_id = plan_id
        info = self._attempt(lambda replica: self._opened(replica).hello(plan_id))[0]
        for replica in self._known():
            try:
                self._opened(replica)
            except WorkerUnavailableError as error:
                self._failed(replica, error, "going on without it for now")
            except WorkerError as error:
                if not self._leave_bad or not self.distrust(replica.name):
                    raise
                LOGGER.warning("%s; %s is not asked again", error, replica.name)
        # Not copied: a worker that cannot list its circuits can still be asked for each.
        maps = [replica.circuits for replica in self._known() if replica.circuits is not None]
        return replace(info, circuits=ChainMap(*cast("list[MutableMapping[str, CircuitInfo]]", maps)))

    def evaluate(self, circuit: str, planes: np.ndarray) -> Answer:
        """See `Transport.evaluate`. One request may be sent several times, to several workers."""
        return self._ask(circuit, lambda transport: transport.evaluate(circuit, planes))

    def setup(self, circuit: str, lattice_dim: int) -> Answer:
        """See `Transport.setup`."""
        return self._ask(circuit, lambda transport: transport.setup(circuit, lattice_dim))

    def hint(self, circuit: str, size: int) -> Answer:
        """See `Transport.hint`."""
        return self._ask(circuit, lambda transport: transport.hint(circuit, size))

    def trusts(self, worker: str) -> bool:
        """Return whether that worker has not been distrusted; one that was may still answer what it was asked before."""
        with self._lock:
            return worker not in self._distrusted

    def distrust(self, worker: str) -> bool:
        """Never ask that worker again; returns whether another one is left and few enough have been distrusted so far.

        Each name gets one try at a lie that the checks miss, and whoever runs the workers chooses the number of names.
        """
        with self._lock:
            bad = [replica for replica in self._replicas if replica.name == worker]
            self._replicas = [replica for replica in self._replicas if replica.name != worker]
            self._distrusted.add(worker)
            left = bool(self._replicas) and len(self._distrusted) <= MOST_DISTRUSTED
        self._close(bad)
        return left

    def close(self) -> None:
        """See `Transport.close`."""
        with self._lock:
            replicas, self._replicas = self._replicas, []
        self._close(replicas)

    def _close(self, replicas: list[_Replica]) -> None:
        for replica in replicas:
            if replica.transport is not None:
                replica.transport.close()

    def _ask(self, circuit: str, request: Callable[[Transport], Answer]) -> Answer:
        answer, name = self._attempt(lambda replica: request(self._opened(replica)), circuit)
        return replace(answer, worker=name)

    def _opened(self, replica: _Replica) -> Transport:
        with replica.lock:  # one thread connects, the others wait
            if replica.transport is None:
                transport = replica.connect()
                replica.circuits = open_connection(transport, self._plan_id).circuits  # closes it when it refuses
                replica.transport = transport
            return replica.transport

    def _attempt(self, ask: Callable[[_Replica], Result], circuit: str | None = None) -> tuple[Result, str]:
        """Try workers that have the circuit until one answers `ask`; returns the answer and the worker's name."""
        failure: WorkerError | None = None
        for attempt in range(1, self._policy.attempts + 1):
            replica = self._choose(circuit)
            try:
                result = ask(replica)
            except WorkerUnavailableError as error:
                self._failed(replica, error, "asking again" if attempt < self._policy.attempts else None)
                asked = f"asked {_counted(attempt, 'time')}, of {_counted(len(self._known()), 'worker')}"
                failure = WorkerUnavailableError(f"{error} ({asked})")
            except WorkerError as error:
                if not self._leave_bad or not self.distrust(replica.name):
                    raise
                failure = error
                LOGGER.warning("%s; %s is not asked again", error, replica.name)
            else:
                self._answered(replica)
                return result, replica.name
            finally:
                with self._lock:
                    replica.in_flight -= 1
        assert failure is not None
        raise failure

    def _choose(self, circuit: str | None) -> _Replica:
        """Pick the worker with fewest requests in flight among those that may be asked now; waits until one may."""
        while True:
            self._ask_who_holds(circuit)
            with self._lock:
                holders = [
                    replica
                    for replica in self._replicas
                    if circuit is None or replica.holds.get(circuit, True)
                ]
                if not holders:
                    what = "" if circuit is None or not self._replicas else f" for {circuit}"
                    raise WorkerError(f"there is no worker left to ask{what}: all were closed or returned wrong results")
                now = time.monotonic()
                ready = [replica for replica in holders if replica.retry_at <= now]
                if ready:
                    chosen = min(ready, key=lambda replica: (replica.in_flight, replica.failures))
                    chosen.in_flight += 1
                    return chosen
                wait = min(replica.retry_at for replica in holders) - now
            self._sleep(wait)

    def _ask_who_holds(self, circuit: str | None) -> None:
        """Ask each worker that has not told yet whether it holds the circuit, so that no other is sent a request for it."""
        now = time.monotonic()
        for replica in self._known() if circuit is not None else ():
            if circuit not in replica.holds and replica.retry_at <= now:
                try:
                    self._opened(replica)
                    assert circuit is not None and replica.circuits is not None
                    replica.holds[circuit] = circuit in replica.circuits
                except WorkerUnavailableError as error:
                    self._failed(replica, error, "asking again later")

    def _known(self) -> list[_Replica]:
        with self._lock:
            return list(self._replicas)

    def _answered(self, replica: _Replica) -> None:
        with self._lock:
            failures, replica.failures = replica.failures, 0
        if failures:
            LOGGER.warning("%s answers again", replica.name)

    def _failed(self, replica: _Replica, error: WorkerError, next_step: str | None) -> None:
        """Let a worker rest, and look for others; say so once until it answers, and not where nothing is tried next."""
        with self._lock:
            replica.failures += 1
            first = replica.failures == 1
            replica.retry_at = time.monotonic() + self._policy.wait(replica.failures)
        if first and next_step is not None:
            LOGGER.warning("%s; %s", error, next_step)
        if self._discover is None:
            return
        try:
            found = self._discover()
        except WorkerUnavailableError as silent:
            if self._directory_answers:
                LOGGER.warning("%s", silent)
            self._directory_answers = False
            return
        self._directory_answers = True
        with self._lock:
            known = self._distrusted | {replica.name for replica in self._replicas}
            self._replicas += [_Replica(name, connect) for name, connect in found.items() if name not in known]


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
