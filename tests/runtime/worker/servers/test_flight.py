"""Arrow Flight: limits, many requests at once, what is logged, the end of a server."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress

import numpy as np
import pytest

from hecompile.bundles.circuit_reference import encrypted_linear_reference
from hecompile.bundles.worker import WorkerBundle
from hecompile.errors import WorkerError
from hecompile.runtime.transports import Transport, connect, open_connection
from hecompile.runtime.worker.engines import Engine, create_engine
from hecompile.runtime.worker.worker import Worker
from tests.support.bundles import PLAN_ID, extreme_planes, extreme_weight, write_bundle

pa = pytest.importorskip("pyarrow", exc_type=ImportError)
fl = pytest.importorskip("pyarrow.flight", exc_type=ImportError)

from hecompile.runtime.transports.flight import FlightTransport  # noqa: E402
from hecompile.runtime.wire.flight_frames import COMMAND  # noqa: E402
from hecompile.runtime.worker.servers import flight as flight_server  # noqa: E402
from hecompile.runtime.worker.servers.flight import FlightWorkerServer  # noqa: E402

WEIGHT = extreme_weight(8, 6)
CIRCUIT = "linear.forward"
LIMIT = 1 << 20
ANY_PORT = "flight://127.0.0.1:0"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> WorkerBundle:
    return write_bundle(tmp_path_factory.mktemp("flight") / "worker", {"linear": (WEIGHT, 24, 16)})


@pytest.fixture(scope="module")
def worker(bundle: WorkerBundle) -> Worker:
    return Worker(bundle, "torch")


@pytest.fixture(scope="module")
def server(worker: Worker) -> Iterator[FlightWorkerServer]:
    with FlightWorkerServer(worker, ANY_PORT, max_message_bytes=LIMIT) as running:
        yield running


def assert_answers(transport: Transport, tokens: int = 5) -> None:
    planes = extreme_planes(3, tokens, 8, seed=tokens)
    np.testing.assert_array_equal(
        transport.evaluate(CIRCUIT, planes).planes, encrypted_linear_reference(planes, WEIGHT, 16)
    )


def assert_serves(address: str) -> None:
    with closing(connect(address)) as transport:
        open_connection(transport, PLAN_ID)
        assert_answers(transport)


def test_refusals_have_the_workers_words_and_leave_the_connection_open(server: FlightWorkerServer) -> None:
    with closing(FlightTransport(server.address)) as transport:
        with pytest.raises(WorkerError, match="refused the request: worker bundle is of another plan: expected ffff"):
            transport.hello("ffff")
        open_connection(transport, PLAN_ID)
        with pytest.raises(
            WorkerError, match=r"refused the request: circuit linear\.forward: planes have shape \[3, 1, 9\]"
        ):
            transport.evaluate(CIRCUIT, np.zeros((3, 1, 9), np.uint8))
        with pytest.raises(
            WorkerError, match=r"refused the request: message of .* bytes; at most 1048576 are accepted"
        ):
            transport.evaluate(CIRCUIT, np.zeros((3, 50_000, 8), np.uint8))
        with pytest.raises(WorkerError, match=r"refused the request: .*larger than max"):  # by gRPC, unread
            transport.evaluate(CIRCUIT, np.zeros((3, 300_000, 8), np.uint8))
        with pytest.raises(WorkerError, match=r"cannot compute the hint of 'linear\.forward'"):
            transport._info.circuits["linear.forward.exact"] = transport._info.circuits[CIRCUIT]  # type: ignore[union-attr]
            transport.setup(CIRCUIT, 1)
        assert_answers(transport)
    with closing(FlightTransport(server.address, max_message_bytes=LIMIT)) as transport:
        transport.hello(PLAN_ID)
        with pytest.raises(WorkerError, match="at most 1048576 are sent; use a smaller batch"):
            transport.evaluate(CIRCUIT, np.zeros((3, 50_000, 8), np.uint8))


class WideEngine:
    """Replies with a MiB to whatever it is asked."""

    name = "wide"

    def evaluate(self, circuit: str, planes: np.ndarray) -> np.ndarray:
        return np.zeros((2, 1 << 19, 1), np.uint8)


def test_a_reply_above_the_limit_is_refused_by_the_client(bundle: WorkerBundle) -> None:
    with FlightWorkerServer(Worker(bundle, WideEngine()), ANY_PORT) as server:
        for limit in (LIMIT, 16 * LIMIT):
            transport = FlightTransport(server.address, max_message_bytes=limit)
            transport.hello(PLAN_ID)
            message = (
                "message of .* at most 1048576 are accepted" if limit == LIMIT else r"reply has shape \(2, 524288, 1\)"
            )
            with pytest.raises(WorkerError, match=message):
                transport.evaluate(CIRCUIT, extreme_planes(3, 1, 8))
            transport.close()


def test_several_clients_and_threads_are_not_mixed_up(server: FlightWorkerServer) -> None:
    """Eight connections with three requests each under way, every one of another size."""
    transports = [connect(server.address) for _ in range(8)]
    for transport in transports:
        open_connection(transport, PLAN_ID)
    with ThreadPoolExecutor(24) as threads:
        list(threads.map(lambda index: assert_answers(transports[index % 8], 1 + index), range(96)))
    for transport in transports:
        transport.close()


class SlowEngine:
    """Computes rightly, after `release` was set; `started` counts the requests that wait for it."""

    name = "slow"

    def __init__(self, bundle: WorkerBundle) -> None:
        self._engine: Engine = create_engine("torch", bundle)
        self.started = threading.Semaphore(0)
        self.release = threading.Event()

    def evaluate(self, circuit: str, planes: np.ndarray) -> np.ndarray:
        self.started.release()
        assert self.release.wait(30)
        return self._engine.evaluate(circuit, planes)


class FailingEngine:
    """Fails with the request's values in its message, as a library might."""

    name = "failing"

    def evaluate(self, circuit: str, planes: np.ndarray) -> np.ndarray:
        raise RuntimeError(f"bad values {planes.tolist()}")


def test_neither_errors_nor_logs_hold_the_payload(
    bundle: WorkerBundle, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    with FlightWorkerServer(Worker(bundle, FailingEngine()), ANY_PORT) as server:
        transport = connect(server.address)
        transport.hello(PLAN_ID)
        with pytest.raises(WorkerError, match=r"refused the request: the worker failed with RuntimeError$"):
            transport.evaluate(CIRCUIT, np.full((3, 1, 8), 173, np.uint8))
        transport.close()
    assert "failed with RuntimeError" in caplog.text
    assert "173" not in caplog.text + "".join(capfd.readouterr())


def test_too_many_requests_are_turned_away(bundle: WorkerBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flight_server, "MAX_REQUESTS", 2)
    engine = SlowEngine(bundle)
    with FlightWorkerServer(Worker(bundle, engine), ANY_PORT) as server, ThreadPoolExecutor(2) as threads:
        transport, late = connect(server.address), connect(server.address)
        transport.hello(PLAN_ID)
        waiting = [threads.submit(assert_answers, transport) for _ in range(2)]
        for _ in waiting:
            assert engine.started.acquire(timeout=20)
        with pytest.raises(WorkerError, match="the worker has 2 requests under way"):
            late.hello(PLAN_ID)
        engine.release.set()
        for future in waiting:
            future.result()
        assert_answers(transport)
        transport.close()


def test_a_stopped_server_answers_what_it_computes(bundle: WorkerBundle) -> None:
    engine = SlowEngine(bundle)
    with ThreadPoolExecutor(1) as threads:
        with FlightWorkerServer(Worker(bundle, engine), ANY_PORT) as server:
            transport = connect(server.address)
            transport.hello(PLAN_ID)
            answered = threads.submit(assert_answers, transport)
            assert engine.started.acquire(timeout=20)
            threading.Timer(0.3, engine.release.set).start()
        answered.result()
        with pytest.raises(WorkerError, match=r"the connection to the worker at flight://.* broke"):
            assert_answers(transport)
        with pytest.raises(WorkerError, match="is closed; connect again"):
            assert_answers(transport)


def test_a_stopped_server_cuts_off_who_never_finishes(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flight_server, "STOP_SECONDS", 0.5)
    with FlightWorkerServer(worker, ANY_PORT) as server:
        writer, reader = fl.FlightClient(server.address.replace("flight://", "grpc://")).do_exchange(
            fl.FlightDescriptor.for_command(COMMAND)
        )
        writer.begin(pa.schema([("payload", pa.uint8())]))  # and nothing after it
        assert_serves(server.address)
        started = time.monotonic()
    assert time.monotonic() - started < 10
    with pytest.raises(fl.FlightUnavailableError):
        reader.read_chunk()
    with suppress(OSError, fl.FlightError):
        writer.close()
