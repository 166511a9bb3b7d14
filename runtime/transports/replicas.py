"""Several workers of one plan: a request goes to the one with least to do, and to another when that one fails.

The workers keep no state, so a request may be sent any number of times: it is always the same ciphertext, and whoever
answers gives the same bytes. Time is measured on the monotonic clock, so that a clock that is set does no harm.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from hecompile.errors import WorkerError, WorkerUnavailableError
from runtime.protocol import WorkerInfo
from runtime.transports.base import Answer, Transport
from runtime.transports.connection import open_connection

Result = TypeVar("Result")
LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class RetryPolicy:
    """How often a request is sent, and how long is waited before it is sent again.

    attempts: at most, over all workers. first_wait, longest_wait: seconds; each wait is twice the one before it, less up to
    a half at random, so that clients of a restarted worker do not all come back at once.
    """

    attempts: int = 6
    first_wait: float = 0.5
    longest_wait: float = 30.0

    def wait(self, failures: int) -> float:
        """Seconds to wait after so many failures."""
        longest = min(self.longest_wait, self.first_wait * 2.0 ** min(failures - 1, 30))
        return longest * random.uniform(0.5, 1.0)  # noqa: S311  no secret


@dataclass
class _Replica:
    name: str
    connect: Callable[[], Transport]
    transport: Transport | None = None  # once it has passed the known-answer test
    in_flight: int = 0
    failures: int = 0  # since it last answered
    retry_at: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Replicas:
    """A transport over several others, each of which takes several requests at once.

    workers: name → what makes a transport to it; each says hello and passes the known-answer test before its first request.
    sleep: for tests.
    """

    concurrent = True

    def __init__(
        self,
        workers: Mapping[str, Callable[[], Transport]],
        policy: RetryPolicy | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._policy = policy or RetryPolicy()
        self._replicas = [_Replica(name, connect) for name, connect in workers.items()]
        self._lock = threading.Lock()
        self._sleep = sleep
        self._plan_id = ""

    def hello(self, plan_id: str) -> WorkerInfo:
        """Open the first worker that answers; see `Transport.hello`."""
        self._plan_id = plan_id
        return self._attempt(lambda replica: self._opened(replica).hello(plan_id))[0]

    def evaluate(self, circuit: str, planes: np.ndarray) -> Answer:
        """See `Transport.evaluate`. The same planes may be sent several times, to several workers."""
        return self._ask(lambda transport: transport.evaluate(circuit, planes))

    def setup(self, circuit: str, lattice_dim: int) -> Answer:
        """See `Transport.setup`."""
        return self._ask(lambda transport: transport.setup(circuit, lattice_dim))

    def distrust(self, worker: str) -> bool:
        """Never ask that worker again; returns whether another one is left."""
        with self._lock:
            bad = [replica for replica in self._replicas if replica.name == worker]
            self._replicas = [replica for replica in self._replicas if replica.name != worker]
            left = bool(self._replicas)
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

    def _ask(self, request: Callable[[Transport], Answer]) -> Answer:
        answer, name = self._attempt(lambda replica: request(self._opened(replica)))
        return replace(answer, worker=name)

    def _opened(self, replica: _Replica) -> Transport:
        with replica.lock:  # one thread makes its acquaintance
            if replica.transport is None:
                transport = replica.connect()
                open_connection(transport, self._plan_id)  # closes it when it refuses
                replica.transport = transport
            return replica.transport

    def _attempt(self, ask: Callable[[_Replica], Result]) -> tuple[Result, str]:
        """What `ask` returns of the first worker that has an answer, and that worker's name."""
        for attempt in range(1, self._policy.attempts + 1):
            replica = self._choose()
            try:
                result = ask(replica)
            except WorkerUnavailableError as error:
                self._failed(replica)
                if attempt == self._policy.attempts:
                    asked = f"asked {attempt} times, of {self._count()} workers"
                    raise WorkerUnavailableError(f"{error} ({asked})") from error
                LOGGER.warning("%s; asking again", error)
                continue
            finally:
                with self._lock:
                    replica.in_flight -= 1
            replica.failures = 0
            return result, replica.name
        raise AssertionError("unreachable")

    def _choose(self) -> _Replica:
        """The worker with fewest requests in flight among those that may be asked now; waits until one may."""
        while True:
            with self._lock:
                if not self._replicas:
                    raise WorkerError("there is no worker left to ask: all were closed or returned wrong results")
                now = time.monotonic()
                ready = [replica for replica in self._replicas if replica.retry_at <= now]
                if ready:
                    chosen = min(ready, key=lambda replica: (replica.in_flight, replica.failures))
                    chosen.in_flight += 1
                    return chosen
                wait = min(replica.retry_at for replica in self._replicas) - now
            self._sleep(wait)

    def _failed(self, replica: _Replica) -> None:
        with self._lock:
            replica.failures += 1
            replica.retry_at = time.monotonic() + self._policy.wait(replica.failures)

    def _count(self) -> int:
        with self._lock:
            return len(self._replicas)
