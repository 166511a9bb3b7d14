"""The pool of connections: how many there are, what each of them passes, and what becomes of one that fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from hecompile.bundles.circuit_reference import encrypted_linear_reference
from hecompile.bundles.worker import KNOWN_ANSWER
from hecompile.errors import WorkerError
from hecompile.runtime.transports import Answer, InProcessTransport, TransportPool, connect, open_connection
from hecompile.runtime.wire.protocol import WorkerInfo
from hecompile.runtime.worker.engines.onnxruntime_engine import OnnxRuntimeEngine
from hecompile.runtime.worker.servers.sockets import WorkerServer
from hecompile.runtime.worker.worker import Worker
from tests.support.bundles import PLAN_ID, extreme_planes, extreme_weight, write_bundle

WEIGHT = extreme_weight(8, 6)
CIRCUIT = "linear.forward"


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    return Worker(write_bundle(tmp_path_factory.mktemp("pool") / "worker", {"linear": (WEIGHT, 24, 16)}))


class Connection:
    """An in-process connection that writes down what it is asked for, and does `before` each evaluation but the tests."""

    concurrent = False

    def __init__(self, worker: Worker, before: Callable[[], None]) -> None:
        self._inner, self._before = InProcessTransport(worker.exchange), before
        self.asked: list[str] = []
        self.closed = False

    def hello(self, plan_id: str) -> WorkerInfo:
        self.asked.append("hello")
        return self._inner.hello(plan_id)

    def evaluate(self, circuit: str, planes: np.ndarray) -> Answer:
        self.asked.append(circuit)
        if circuit != KNOWN_ANSWER:
            self._before()
        return self._inner.evaluate(circuit, planes)

    def close(self) -> None:
        self.closed = True
        self._inner.close()


class Factory:
    """Makes connections and keeps them."""

    def __init__(self, worker: Worker, before: Callable[[], None] = lambda: None) -> None:
        self._worker, self.before = worker, before
        self.made: list[Connection] = []

    def __call__(self) -> Connection:
        self.made.append(Connection(self._worker, lambda: self.before()))
        return self.made[-1]


def ask(pool: TransportPool, tokens: int = 4) -> None:
    planes = extreme_planes(3, tokens, 8)
    np.testing.assert_array_equal(
        pool.evaluate(CIRCUIT, planes).planes, encrypted_linear_reference(planes, WEIGHT, 16)
    )


def in_threads(count: int, work: Callable[[], None]) -> list[BaseException]:
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


def test_one_thread_uses_one_connection(worker: Worker) -> None:
    factory = Factory(worker)
    pool = TransportPool(factory, 3)
    open_connection(pool, PLAN_ID)
    for _ in range(3):
        ask(pool)
    (connection,) = factory.made
    assert connection.asked == ["hello", KNOWN_ANSWER, KNOWN_ANSWER, CIRCUIT, CIRCUIT, CIRCUIT]


def test_as_many_connections_as_are_in_flight_and_each_is_tested(worker: Worker) -> None:
    together = threading.Barrier(3, timeout=30)  # passes only if three requests are under way at the same time
    factory = Factory(worker, lambda: together.wait() and None)
    pool = TransportPool(factory, 3)
    open_connection(pool, PLAN_ID)
    assert in_threads(6, lambda: ask(pool)) == []
    assert len(factory.made) == 3
    for connection in factory.made:
        assert connection.asked[:3] == ["hello", KNOWN_ANSWER, KNOWN_ANSWER]
    assert sum(connection.asked.count(CIRCUIT) for connection in factory.made) == 6


def test_a_connection_that_fails_is_closed_and_replaced(worker: Worker) -> None:
    def fail() -> None:
        raise WorkerError("broken")

    factory = Factory(worker)
    pool = TransportPool(factory, 1)
    open_connection(pool, PLAN_ID)
    factory.before = fail
    with pytest.raises(WorkerError, match="broken"):
        ask(pool)
    assert factory.made[0].closed
    factory.before = lambda: None
    ask(pool)  # and the turn of the one that failed was given back
    assert len(factory.made) == 2 and factory.made[1].asked == ["hello", KNOWN_ANSWER, KNOWN_ANSWER, CIRCUIT]


def test_a_later_connection_to_a_worker_that_computes_wrongly_is_refused(worker: Worker) -> None:
    class Wrong(OnnxRuntimeEngine):
        def evaluate(self, circuit: str, planes: np.ndarray) -> np.ndarray:
            return super().evaluate(circuit, planes) ^ np.uint8(circuit == KNOWN_ANSWER)

    workers: Iterator[Worker] = iter([worker, Worker(worker.bundle, Wrong(worker.bundle))])
    connections: list[InProcessTransport] = []

    def connection() -> InProcessTransport:
        connections.append(InProcessTransport(next(workers).exchange))
        return connections[-1]

    pool = TransportPool(connection, 2)
    open_connection(pool, PLAN_ID)
    first_is_busy, done = threading.Event(), threading.Event()
    inner = connections[0].evaluate

    def slow(circuit: str, planes: np.ndarray) -> Answer:
        first_is_busy.set()
        done.wait(30)
        return inner(circuit, planes)

    connections[0].evaluate = slow  # type: ignore[method-assign]
    thread = threading.Thread(target=lambda: ask(pool))
    thread.start()
    first_is_busy.wait(30)
    with pytest.raises(WorkerError, match="computes wrongly"):
        ask(pool)
    done.set()
    thread.join()


def test_closing_ends_every_connection_and_later_requests(worker: Worker) -> None:
    factory = Factory(worker)
    pool = TransportPool(factory, 2)
    open_connection(pool, PLAN_ID)
    pool.close()
    assert factory.made[0].closed
    for call in (lambda: ask(pool), lambda: pool.hello(PLAN_ID)):
        with pytest.raises(WorkerError, match="closed; connect again"):
            call()


def test_evaluate_before_hello_is_refused(worker: Worker) -> None:
    with pytest.raises(WorkerError, match="before hello"):
        ask(TransportPool(Factory(worker), 1))


def test_several_threads_over_sockets_to_one_server(worker: Worker) -> None:
    with WorkerServer(worker, "tcp://127.0.0.1:0") as server:
        pool = TransportPool(lambda: connect(server.address), 3)
        open_connection(pool, PLAN_ID)
        assert in_threads(5, lambda: [ask(pool, tokens) for tokens in (1, 4, 9)] and None) == []
        pool.close()


def test_a_worker_that_is_gone_is_named(worker: Worker) -> None:
    with WorkerServer(worker, "tcp://127.0.0.1:0") as server:
        address = server.address
        pool = TransportPool(lambda: connect(address), 1)
        open_connection(pool, PLAN_ID)
    with pytest.raises(WorkerError, match=r"broke|closed the connection"):
        ask(pool)
    with pytest.raises(WorkerError, match="no worker answers"):
        ask(pool)


def test_the_bundle_of_another_plan_is_refused(worker: Worker) -> None:
    factory = Factory(worker)
    with pytest.raises(WorkerError, match="another plan"):
        open_connection(TransportPool(factory, 2), "ffffffff")
    assert factory.made[0].closed
