"""Several workers of one plan: who is asked, what is sent again and to whom, and when it is given up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from hecompile.errors import WorkerError, WorkerUnavailableError
from hecompile.worker_bundle import KNOWN_ANSWER
from passes.lower_worker import encrypted_linear_reference
from runtime.protocol import WorkerInfo
from runtime.transports import (
    Answer,
    InProcessTransport,
    Replicas,
    RetryPolicy,
    TransportPool,
    connect,
    open_connection,
)
from runtime.worker import Worker, WorkerServer
from tests.worker.bundles import PLAN_ID, extreme_planes, extreme_weight, write_bundle

WEIGHT = extreme_weight(8, 6)
CIRCUIT = "linear.forward"
PLANES = extreme_planes(3, 4, 8)
ANSWER = encrypted_linear_reference(PLANES, WEIGHT, 2)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    return Worker(write_bundle(tmp_path_factory.mktemp("replicas") / "worker", {"linear": (WEIGHT, 3, 2)}))


class Fragile:
    """A transport to an embedded worker whose requests first do `before`; notes the payloads that were sent."""

    concurrent = True

    def __init__(self, worker: Worker, before: Callable[[], None]) -> None:
        self._inner, self._before = InProcessTransport(worker), before
        self.sent: list[bytes] = []
        self.closed = False

    def hello(self, plan_id: str) -> WorkerInfo:
        return self._inner.hello(plan_id)

    def evaluate(self, circuit: str, planes: np.ndarray) -> Answer:
        if circuit != KNOWN_ANSWER:
            self.sent.append(planes.tobytes())
            self._before()
        return self._inner.evaluate(circuit, planes)

    def setup(self, circuit: str, lattice_dim: int) -> Answer:
        raise AssertionError("not asked for here")

    def close(self) -> None:
        self.closed = True


def failing(times: int, error: type[WorkerError] = WorkerUnavailableError) -> Callable[[], None]:
    left = [times]

    def fail() -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise error("it broke")

    return fail


def no_failure() -> None: ...


def replicas(transports: dict[str, Fragile], attempts: int = 6) -> tuple[Replicas, list[float]]:
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        threading.Event().wait(seconds)

    policy = RetryPolicy(attempts, first_wait=0.01, longest_wait=0.03)
    return Replicas({name: lambda t=t: t for name, t in transports.items()}, policy, sleep), waits  # type: ignore[misc]


def test_the_same_ciphertext_is_sent_again_until_there_is_an_answer(worker: Worker) -> None:
    only = Fragile(worker, failing(3))
    transport, waits = replicas({"a": only})
    open_connection(transport, PLAN_ID)
    answer = transport.evaluate(CIRCUIT, PLANES)
    assert np.array_equal(answer.planes, ANSWER) and answer.worker == "a"
    assert only.sent == [PLANES.tobytes()] * 4
    assert 3 <= len(waits) <= 6 and max(waits) <= 0.03


def test_it_is_given_up_after_so_many_attempts_with_the_reason(worker: Worker) -> None:
    only = Fragile(worker, failing(100))
    transport, _ = replicas({"a": only}, attempts=3)
    open_connection(transport, PLAN_ID)
    with pytest.raises(WorkerUnavailableError, match=r"it broke \(asked 3 times, of 1 workers\)"):
        transport.evaluate(CIRCUIT, PLANES)
    assert len(only.sent) == 3


def test_a_refusal_is_not_asked_again(worker: Worker) -> None:
    one, other = Fragile(worker, failing(1, WorkerError)), Fragile(worker, no_failure)
    transport, waits = replicas({"a": one, "b": other})
    open_connection(transport, PLAN_ID)
    with pytest.raises(WorkerError, match="it broke"):
        transport.evaluate(CIRCUIT, PLANES)
    assert len(one.sent) + len(other.sent) == 1 and waits == []


def test_another_worker_steps_in_at_once(worker: Worker) -> None:
    dead, alive = Fragile(worker, failing(100)), Fragile(worker, no_failure)
    transport, waits = replicas({"dead": dead, "alive": alive})
    open_connection(transport, PLAN_ID)
    assert {transport.evaluate(CIRCUIT, PLANES).worker for _ in range(3)} == {"alive"}
    assert dead.sent[0] == alive.sent[0] and waits == []


def test_requests_in_flight_are_spread(worker: Worker) -> None:
    gate = threading.Barrier(4, timeout=30)  # opens only when four requests are under way at once
    workers = {name: Fragile(worker, gate.wait) for name in "ab"}
    transport, _ = replicas(workers)  # type: ignore[arg-type]
    open_connection(transport, PLAN_ID)
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda _: transport.evaluate(CIRCUIT, PLANES), range(4)))
    assert sorted(answer.worker for answer in answers) == ["a", "a", "b", "b"]
    assert all(np.array_equal(answer.planes, ANSWER) for answer in answers)


def test_a_distrusted_worker_is_closed_and_never_asked_again(worker: Worker) -> None:
    workers = {name: Fragile(worker, no_failure) for name in "ab"}
    transport, _ = replicas(workers)
    open_connection(transport, PLAN_ID)
    bad = transport.evaluate(CIRCUIT, PLANES).worker
    assert transport.distrust(bad)
    asked = len(workers[bad].sent)
    (good,) = {transport.evaluate(CIRCUIT, PLANES).worker for _ in range(5)}
    assert good != bad and workers[bad].closed and len(workers[bad].sent) == asked
    assert not transport.distrust(good)
    with pytest.raises(WorkerError, match="no worker left"):
        transport.evaluate(CIRCUIT, PLANES)


def test_a_worker_that_comes_back_on_its_address_is_met_again(worker: Worker) -> None:
    with WorkerServer(worker, "tcp://127.0.0.1:0") as server:
        address = server.address
        policy = RetryPolicy(attempts=20, first_wait=0.05, longest_wait=0.2)
        transport = Replicas({address: lambda: TransportPool(lambda: connect(address), 2)}, policy)
        open_connection(transport, PLAN_ID)
        assert np.array_equal(transport.evaluate(CIRCUIT, PLANES).planes, ANSWER)
    restarted = threading.Event()

    def restart() -> None:
        with WorkerServer(worker, address):
            restarted.set()
            done.wait(60)

    done = threading.Event()
    timer = threading.Timer(0.4, restart)
    timer.start()
    assert np.array_equal(transport.evaluate(CIRCUIT, PLANES).planes, ANSWER)
    assert restarted.is_set()
    transport.close()
    done.set()
    timer.join()


def test_waits_grow_and_are_bounded() -> None:
    policy = RetryPolicy(first_wait=1.0, longest_wait=8.0)
    for failures, longest in ((1, 1), (2, 2), (3, 4), (4, 8), (5, 8), (10**6, 8)):
        waits = [policy.wait(failures) for _ in range(50)]
        assert longest / 2 <= min(waits) and max(waits) <= longest
        assert max(waits) > min(waits)
