"""Several workers of one plan: who is asked, what is sent again and to whom, and when it is given up."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from hecompile.bundles.circuit_reference import encrypted_linear_reference
from hecompile.bundles.worker import KNOWN_ANSWER
from hecompile.errors import InputError, WorkerError, WorkerUnavailableError
from hecompile.runtime.transports import (
    Answer,
    InProcessTransport,
    Replicas,
    RetryPolicy,
    TransportPool,
    connect,
    open_connection,
)
from hecompile.runtime.wire.protocol import CircuitInfo, WorkerInfo
from hecompile.runtime.worker.servers.sockets import WorkerServer
from hecompile.runtime.worker.shards import parse_layers, shard, split_layers
from hecompile.runtime.worker.worker import Worker
from tests.support.bundles import PLAN_ID, extreme_planes, extreme_weight, write_bundle

WEIGHT = extreme_weight(8, 6)
CIRCUIT = "linear.forward"
PLANES = extreme_planes(3, 4, 8)
ANSWER = encrypted_linear_reference(PLANES, WEIGHT, 16)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    return Worker(write_bundle(tmp_path_factory.mktemp("replicas") / "worker", {"linear": (WEIGHT, 24, 16)}))


class Fragile:
    """A transport to an embedded worker whose requests first do `before`; notes the payloads that were sent."""

    concurrent = True

    def __init__(self, worker: Worker, before: Callable[[], None]) -> None:
        self._inner, self._before = InProcessTransport(worker.exchange), before
        self.sent: list[bytes] = []
        self.closed = False

    def hello(self, plan_id: str) -> WorkerInfo:
        return self._inner.hello(plan_id)

    def evaluate(self, circuit: str, planes: np.ndarray) -> Answer:
        if circuit != KNOWN_ANSWER:
            self.sent.append(planes.tobytes())
            self._before()
        return self._inner.evaluate(circuit, planes)

    def hint(self, circuit: str, size: int) -> Answer:
        raise AssertionError("not asked for here")

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
    return Replicas({name: lambda t=t: t for name, t in transports.items()}, policy, sleep=sleep), waits  # type: ignore[misc]


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
    with pytest.raises(WorkerUnavailableError, match=r"it broke \(asked 3 times, of 1 worker\)"):
        transport.evaluate(CIRCUIT, PLANES)
    assert len(only.sent) == 3


@pytest.mark.parametrize(
    ("failures", "attempts", "lines"),
    [(3, 6, ["it broke; asking again", "a answers again"]), (100, 4, ["it broke; asking again"]), (100, 1, [])],
)
def test_each_change_of_state_is_one_line(
    worker: Worker, caplog: pytest.LogCaptureFixture, failures: int, attempts: int, lines: list[str]
) -> None:
    transport, _ = replicas({"a": Fragile(worker, failing(failures))}, attempts)
    open_connection(transport, PLAN_ID)
    if failures < attempts:
        transport.evaluate(CIRCUIT, PLANES)
    else:
        with pytest.raises(WorkerUnavailableError, match=rf"asked {attempts} times?, of 1 worker\)"):
            transport.evaluate(CIRCUIT, PLANES)
    assert [record.getMessage() for record in caplog.records] == lines


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


def test_shards_are_asked_for_their_own_circuits_only(tmp_path: Path) -> None:
    weights = {f"model.layers.{layer}.o": (extreme_weight(8, 6, seed=layer), 24, 16) for layer in range(4)}
    bundle = write_bundle(tmp_path / "worker", weights)
    shards = {f"{part.start}-{copy}": Fragile(Worker(shard(bundle, part)), no_failure)
              for part in split_layers(4, 2) for copy in "ab"}  # fmt: skip
    transport, _ = replicas(shards)
    info = open_connection(transport, PLAN_ID)
    assert set(info.circuits) == set(bundle.circuits)
    for layer in range(4):
        answer = transport.evaluate(f"model.layers.{layer}.o.forward", PLANES)
        weight = extreme_weight(8, 6, seed=layer)
        assert np.array_equal(answer.planes, encrypted_linear_reference(PLANES, weight, 16))
        assert answer.worker.startswith("0-" if layer < 2 else "2-")
    for copy in "ab":
        transport.distrust(f"0-{copy}")
    assert transport.evaluate("model.layers.3.o.forward", PLANES).worker.startswith("2-")
    with pytest.raises(WorkerError, match=r"no worker left to ask for model.layers.0.o.forward"):
        transport.evaluate("model.layers.0.o.forward", PLANES)


def test_a_shard_that_was_away_at_the_start_is_met_when_it_is_back(tmp_path: Path) -> None:
    weights = {f"model.layers.{layer}.o": (extreme_weight(8, 6, seed=layer), 24, 16) for layer in range(2)}
    bundle = write_bundle(tmp_path / "worker", weights)
    one, other = (Worker(shard(bundle, range(layer, layer + 1))) for layer in range(2))
    away = failing(2)

    def second() -> Fragile:
        away()
        return Fragile(other, no_failure)

    policy = RetryPolicy(6, first_wait=0.01, longest_wait=0.02)
    transport = Replicas({"one": lambda: Fragile(one, no_failure), "other": second}, policy)
    assert "model.layers.1.o.forward" not in open_connection(transport, PLAN_ID).circuits
    answer = transport.evaluate("model.layers.1.o.forward", PLANES)
    assert answer.worker == "other"


@pytest.mark.parametrize(("text", "wanted"), [("0-7", range(8)), ("3", range(3, 4))])
def test_layers_are_parsed(text: str, wanted: range) -> None:
    assert parse_layers(text) == wanted


@pytest.mark.parametrize("text", ["", "7-3", "-1", "a", "1-2-3"])
def test_malformed_layers_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="FIRST-LAST"):
        parse_layers(text)


def test_layers_are_split_evenly_and_nothing_is_left_out(tmp_path: Path) -> None:
    assert [len(part) for part in split_layers(16, 3)] == [5, 6, 5]
    assert [layer for part in split_layers(7, 4) for layer in part] == list(range(7))
    with pytest.raises(InputError, match="cannot be split"):
        split_layers(2, 3)
    bundle = write_bundle(tmp_path / "worker", {"linear": (WEIGHT, 24, 16)})
    assert set(shard(bundle, range(1)).circuits) == set(bundle.circuits)  # outside all layers: with the first
    with pytest.raises(InputError, match="none of 4-4"):
        shard(bundle, range(4, 5))
    four = write_bundle(tmp_path / "four", {f"model.layers.{layer}.mlp": (WEIGHT, 24, 16) for layer in range(4)})
    assert len(shard(four, parse_layers("2-3")).circuits) == 5  # of two layers, and the known answer
    for text in ("0-7", "3-4"):  # a slip: the worker would serve less than it was asked for
        with pytest.raises(InputError, match=f"has 4 layers, not all of {text}: the last is 3, counted from 0"):
            shard(four, parse_layers(text))


def test_a_replacement_is_discovered_after_a_failure(worker: Worker) -> None:
    dead, fresh = Fragile(worker, failing(100)), Fragile(worker, no_failure)
    listed: dict[str, Callable[[], Fragile]] = {"dead": lambda: dead}
    policy = RetryPolicy(6, first_wait=0.01, longest_wait=0.02)
    transport = Replicas(dict(listed), policy, discover=lambda: listed)
    open_connection(transport, PLAN_ID)
    listed["fresh"] = lambda: fresh
    assert transport.evaluate(CIRCUIT, PLANES).worker == "fresh"
    assert transport.distrust("fresh")
    with pytest.raises(WorkerUnavailableError):  # it is still listed, and stays out
        transport.evaluate(CIRCUIT, PLANES)
    assert len(fresh.sent) == 1


def test_a_session_ends_after_so_many_caught_lies_however_many_workers_there_are(worker: Worker) -> None:
    transport, _ = replicas({name: Fragile(worker, no_failure) for name in "abcdefgh"})
    open_connection(transport, PLAN_ID)
    assert [transport.distrust(name) for name in "abc"] == [True, True, False]


@pytest.mark.parametrize("leave_bad", [False, True])
def test_a_worker_that_refuses_is_left_for_another_where_that_is_asked_for(worker: Worker, leave_bad: bool) -> None:
    bad, good = Fragile(worker, failing(100, WorkerError)), Fragile(worker, no_failure)
    transport = Replicas({"bad": lambda: bad, "good": lambda: good}, leave_bad=leave_bad)
    open_connection(transport, PLAN_ID)
    if not leave_bad:
        with pytest.raises(WorkerError, match="it broke"):
            transport.evaluate(CIRCUIT, PLANES)
        return
    assert [transport.evaluate(CIRCUIT, PLANES).worker for _ in range(3)] == ["good"] * 3
    assert len(bad.sent) == 1 and bad.closed


def test_a_worker_of_another_plan_among_others_is_left_or_ends_it(worker: Worker, tmp_path: Path) -> None:
    other = Worker(write_bundle(tmp_path / "other", {"linear": (WEIGHT, 24, 16)}, "ab" * 16))
    workers = {"good": lambda: InProcessTransport(worker.exchange), "other": lambda: InProcessTransport(other.exchange)}
    with pytest.raises(WorkerError, match="another plan"):
        open_connection(Replicas(workers), PLAN_ID)
    transport = Replicas(workers, leave_bad=True)
    open_connection(transport, PLAN_ID)
    assert transport.evaluate(CIRCUIT, PLANES).worker == "good"


def test_a_worker_that_dies_before_it_was_asked_for_a_circuit_is_passed_over(worker: Worker) -> None:
    """A generic server is asked for each circuit when that is first needed: by then it may be gone."""

    class Asked(dict[str, CircuitInfo]):
        def __contains__(self, circuit: object) -> bool:
            if circuit != KNOWN_ANSWER:
                raise WorkerUnavailableError("it is gone")
            return True

    class Generic(Fragile):
        def hello(self, plan_id: str) -> WorkerInfo:
            info = super().hello(plan_id)
            return dataclasses.replace(info, circuits=Asked(info.circuits))

    gone, alive = Generic(worker, failing(100)), Fragile(worker, no_failure)
    transport, _ = replicas({"gone": gone, "alive": alive})
    open_connection(transport, PLAN_ID)
    assert transport.evaluate(CIRCUIT, PLANES).worker == "alive"
