"""Neither side of a polynomial plan waits for ever for one that is silent, slow, or takes nothing."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from hecompile.ckks.keys import SecretKey
from hecompile.errors import WorkerError, WorkerUnavailableError
from hecompile.runtime.ckks import messages
from hecompile.runtime.ckks import worker as ckks_worker
from hecompile.runtime.ckks.client import CkksSession
from hecompile.runtime.ckks.messages import PROTOCOL, receive, send
from hecompile.runtime.ckks.worker import CkksWorker
from hecompile.runtime.wire.framing import MAGIC, PREFIX
from tests.runtime.ckks.test_plan import TOKENS, noise, playing

ERRORS = {
    "silent": "worker at .* was silent for 1 s",
    "slow": "nothing of a message that had begun came for 1 s, or too little",
    "takes nothing": "worker at .* takes nothing of a message",
}


@pytest.mark.parametrize("what", ERRORS)
def test_a_worker_that_stops_in_between_is_given_up(
    build: Path, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()

    def script(connection: socket.socket) -> None:
        if what == "takes nothing":
            name, shape = next(iter(session.plan.refreshes.items()))
            send(connection, "refresh", noise(session, int(np.prod(shape))), value=name, level=1)
        for octet in PREFIX.pack(MAGIC, 600, 0) + bytes(600) if what == "slow" else b"":
            with contextlib.suppress(OSError):
                connection.sendall(bytes([octet]))
            if over.wait(0.05):
                break
        over.wait(30)

    with playing(tmp_path, script) as address, CkksSession(build / "client", address) as session:
        session._timeout = 1 if what == "silent" else 30
        monkeypatch.setattr(messages, "PATIENCE", 1)
        start = time.monotonic()
        with pytest.raises(WorkerUnavailableError, match=ERRORS[what]):
            session.logits(TOKENS)
        over.set()
    assert time.monotonic() - start < 20  # the bytes alone would take 30 seconds


def test_a_client_that_stops_in_a_refresh_does_not_hold_up_the_others(
    build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, ends = CkksWorker(build / "worker"), []
    key = SecretKey(worker.parameters)

    def serve(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            worker.serve(connection)
        ends.append(worker.turn.locked())

    ours, theirs = socket.socketpair()
    with contextlib.closing(key), ours:
        thread = threading.Thread(target=serve, args=(theirs,))
        thread.start()
        send(ours, "open", key.evaluation_keys().words, protocol=PROTOCOL, plan_id=worker.plan.plan_id)
        receive(ours, 0)
        monkeypatch.setattr(ckks_worker, "_ANSWER_SECONDS", 0.3)
        send(ours, "run", key.encrypt(np.zeros((worker.plan.sequence_length * worker.plan.hidden, 1))))
        assert receive(ours, 1 << 30)[0]["kind"] == "refresh"
        with pytest.raises(WorkerError, match="closed"):
            receive(ours, 1 << 30, 30)
        thread.join(30)
    assert ends == [False]
