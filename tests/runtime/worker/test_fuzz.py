"""Hostile bytes: whatever a worker is sent, it answers with one frame, goes on serving, and keeps nothing.

10000 inputs in all: mutations of valid frames into the message handler, and garbage over a real socket.
"""

from __future__ import annotations

import gc
import json
import logging
import random
import socket
import time
import tracemalloc

import numpy as np
import pytest

from benchmarks.timing import resident_bytes as _resident
from hecompile.bundles.circuit_reference import encrypted_linear_reference
from hecompile.errors import WorkerError, WorkerUnavailableError
from hecompile.runtime.transports import connect, open_connection
from hecompile.runtime.transports.base import Transport
from hecompile.runtime.transports.replicas import Replicas, RetryPolicy
from hecompile.runtime.wire import connections, framing, protocol
from hecompile.runtime.wire.framing import Frame
from hecompile.runtime.wire.protocol import (
    ErrorReply,
    EvaluateReply,
    EvaluateRequest,
    HelloRequest,
    HintRequest,
    SetupRequest,
    WorkerInfo,
)
from hecompile.runtime.worker.servers.sockets import WorkerServer
from hecompile.runtime.worker.worker import Worker
from tests.support.bundles import PLAN_ID, extreme_planes, extreme_weight, write_bundle

WEIGHT = extreme_weight(8, 6)
CIRCUIT = "linear.forward"
PLANES = extreme_planes(3, 4, 8)
HANDLED, CONNECTIONS = 9_700, 300
VALID = [
    HelloRequest(PLAN_ID), EvaluateRequest(CIRCUIT, PLANES), EvaluateRequest("known_answer", PLANES), SetupRequest(CIRCUIT),
    HintRequest(CIRCUIT),
]  # fmt: skip
STRANGE = [
    None, True, -1, 0, 2**31, 2**63, 1e308, float("nan"), "", "x" * 5000, "\x00", "ü", [], [[]], {}, {"a": []}, [3, 4, -8]
]  # fmt: skip


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    return Worker(write_bundle(tmp_path_factory.mktemp("fuzz") / "worker", {"linear": (WEIGHT, 24, 16)}))


def mutated(chance: random.Random) -> Frame:
    """A valid request with something changed: a field, bytes of the header, or the payload's length."""
    frame = protocol.encode(chance.choice(VALID), chance.randrange(2**31))
    header, payload = bytearray(frame.header), bytearray(bytes(frame.payload))
    kind = chance.randrange(5)
    if kind == 0:
        fields = json.loads(header)
        fields[chance.choice([*fields, "surprise"])] = chance.choice(STRANGE)
        header = bytearray(json.dumps(fields).encode())
    elif kind == 1:
        fields = json.loads(header)
        del fields[chance.choice(list(fields))]
        header = bytearray(json.dumps(fields).encode())
    elif kind == 2:
        for _ in range(chance.randrange(1, 6)):
            header[chance.randrange(len(header))] = chance.randrange(256)
    elif kind == 3:
        payload = bytearray(chance.randbytes(chance.randrange(200)))
    else:
        header = bytearray(chance.randbytes(chance.randrange(64)))
    return Frame(bytes(header), bytes(payload))


def test_the_handler_answers_anything_with_one_frame_and_keeps_nothing(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "hecompile.runtime.worker.worker")  # pytest would keep every warning
    chance = random.Random(1)
    refused = answered = 0

    def run(count: int) -> None:
        nonlocal refused, answered
        for _ in range(count):
            _, reply = protocol.decode_reply(worker.exchange(mutated(chance)))
            refused += isinstance(reply, ErrorReply)
            answered += isinstance(reply, EvaluateReply | WorkerInfo)

    run(500)  # what is made once
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        run(HANDLED - 500)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert refused + answered == HANDLED
    assert refused > HANDLED / 2 and answered > 100  # some mutations leave a request as good as it was
    assert after - before < 200_000


def test_garbage_on_the_socket_ends_that_connection_and_no_other(
    worker: Worker, capfd: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(2)
    with WorkerServer(worker, "tcp://127.0.0.1:0") as server:
        patient = connect(server.address)
        open_connection(patient, PLAN_ID)
        port = int(server.address.rsplit(":", 1)[1])
        for index in range(CONNECTIONS):
            with socket.create_connection(("127.0.0.1", port), timeout=30) as hostile:
                frame = mutated(chance)
                whole = frame.prefix() + frame.header + bytes(frame.payload)
                kind = index % 3
                if kind == 0:
                    hostile.sendall(chance.randbytes(chance.randrange(1, 300)))
                elif kind == 1:
                    hostile.sendall(whole[: chance.randrange(1, len(whole))])  # and goes away in mid-message
                else:
                    corrupt = bytearray(whole)
                    corrupt[chance.randrange(framing.PREFIX.size)] ^= 1 << chance.randrange(8)
                    hostile.sendall(corrupt)
            if index % 50 == 0:
                answer = patient.evaluate(CIRCUIT, PLANES)
                assert np.array_equal(answer.planes, encrypted_linear_reference(PLANES, WEIGHT, 16))
        patient.close()
        fresh = connect(server.address)
        open_connection(fresh, PLAN_ID)
        fresh.close()
    assert "Traceback" not in capfd.readouterr().err


def test_half_open_connections_do_not_keep_others_waiting(worker: Worker) -> None:
    with WorkerServer(worker, "tcp://127.0.0.1:0") as server:
        port = int(server.address.rsplit(":", 1)[1])
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        for index, connection in enumerate(silent):
            connection.sendall(framing.MAGIC[: index % 5])
        own = connect(server.address, reply_timeout=30)
        open_connection(own, PLAN_ID)
        assert np.array_equal(own.evaluate(CIRCUIT, PLANES).planes, encrypted_linear_reference(PLANES, WEIGHT, 16))
        own.close()
        for connection in silent:
            connection.close()


def test_a_message_that_stands_still_is_given_up_and_costs_no_memory(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "RECEIVE_TIMEOUT_SECONDS", 0.2)
    before = _resident()[0]
    with WorkerServer(worker, "tcp://127.0.0.1:0") as server:
        port = int(server.address.rsplit(":", 1)[1])
        slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(8)]
        for connection in slow:  # each promises half a GiB
            connection.sendall(framing.PREFIX.pack(framing.MAGIC, 2, 1 << 29) + b"{}" + b"x")
        own = connect(server.address, reply_timeout=30)
        open_connection(own, PLAN_ID)
        assert np.array_equal(own.evaluate(CIRCUIT, PLANES).planes, encrypted_linear_reference(PLANES, WEIGHT, 16))
        for connection in slow:
            frame = framing.receive_frame(connection)
            assert frame is not None and "had begun came for 0.2 s" in str(protocol.decode_reply(frame)[1])
            assert framing.receive_frame(connection) is None  # and the connection is ended
            connection.close()
        assert _resident()[0] - before < 1 << 28
        # Between two messages a client may be silent for longer.
        time.sleep(0.4)
        assert np.array_equal(own.evaluate(CIRCUIT, PLANES).planes, encrypted_linear_reference(PLANES, WEIGHT, 16))
        own.close()


def test_one_connection_too_many_is_told_so_and_the_others_are_served(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 3)
    with WorkerServer(worker, "tcp://127.0.0.1:0") as server:
        served = [connect(server.address) for _ in range(3)]
        for transport in served:
            open_connection(transport, PLAN_ID)
        with pytest.raises(WorkerError, match="serves 3 connections already; try again later"):
            connect(server.address).hello(PLAN_ID)
        for transport in served:
            answer = transport.evaluate(CIRCUIT, PLANES)
            assert np.array_equal(answer.planes, encrypted_linear_reference(PLANES, WEIGHT, 16))
            transport.close()


def test_a_clock_that_jumps_changes_nothing(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall clock is set by days at every look, back and forth, while requests fail, wait and are sent again."""
    real, jumps = time.time, iter(range(1, 1 << 30))
    monkeypatch.setattr(time, "time", lambda: real() + 86400.0 * 10 * (-1) ** next(jumps))
    failures = [3]

    def connect_at_last() -> Transport:
        if failures[0]:
            failures[0] -= 1
            raise WorkerUnavailableError("not yet")
        return connect(server.address, reply_timeout=5)

    waits: list[float] = []
    with WorkerServer(worker, "tcp://127.0.0.1:0") as server:
        own = Replicas({"one": connect_at_last}, RetryPolicy(attempts=5), sleep=waits.append)
        open_connection(own, PLAN_ID)
        for _ in range(20):
            answer = own.evaluate(CIRCUIT, PLANES)
            assert np.array_equal(answer.planes, encrypted_linear_reference(PLANES, WEIGHT, 16))
            assert 0.0 <= answer.worker_seconds < 5.0
        own.close()
    assert waits and all(0.0 <= wait <= RetryPolicy().longest_wait for wait in waits)


@pytest.mark.parametrize("field", ["shape", "circuit"])
def test_an_error_repeats_no_byte_of_the_payload(worker: Worker, field: str) -> None:
    marker = b"SECRET-MARKER"
    planes = np.frombuffer(marker * 8, dtype=np.uint8)[:96].reshape(3, 4, 8)
    frame = protocol.encode(EvaluateRequest(CIRCUIT, planes), 1)
    fields = json.loads(frame.header) | {field: [3, 4, 9] if field == "shape" else "no.such.circuit"}
    reply = worker.exchange(Frame(json.dumps(fields).encode(), frame.payload))
    assert marker[:6] not in reply.header and len(reply.payload) == 0
    _, answer = protocol.decode_reply(reply)
    assert isinstance(answer, ErrorReply) and answer.message
