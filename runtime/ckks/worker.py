"""Serve a polynomial plan: the worker holds the public circuit, and public evaluation keys of each client."""

from __future__ import annotations

import logging
import os
import signal
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hecompile.bundles.ckks import open_worker
from hecompile.ckks.evaluator import CkksTensor, Evaluator
from hecompile.ckks.keys import EvaluationKeys, in_range
from hecompile.ckks.parameters import CkksParameters
from hecompile.errors import HecompileError, InputError, WorkerError
from hecompile.files import reason_of
from hecompile.passes.polynomial.expand_polynomials import EMBEDDINGS
from hecompile.runtime.ckks.messages import PROTOCOL, expect, receive, send
from hecompile.runtime.wire.address import TcpAddress, UnixAddress, parse_address
from hecompile.runtime.wire.connections import SEND_TIMEOUT_SECONDS, server_class, waits
from hecompile.runtime.wire.framing import MAX_REQUEST_HEADER_BYTES

LOGGER = logging.getLogger(__name__)
_ANSWER_SECONDS = 300.0
"""Time that a client has to make its evaluation keys, and to refresh ciphertexts, before it begins to send them. While it
refreshes no other client's circuit is evaluated."""


class CkksWorker:
    """Evaluate a plan's circuit for clients. Immutable: every session has its own evaluator."""

    def __init__(self, directory: str | Path, threads: int | None = None) -> None:
        self.plan, self.circuit, self.parameters = open_worker(directory)
        self.threads = threads or os.cpu_count() or 1
        # One evaluation at a time: each takes all threads, and the memory of all its ciphertexts.
        self.turn = threading.Lock()

    def serve(self, connection: socket.socket, opened: Callable[[], None] = lambda: None) -> None:
        """Serve one session to its end; `opened` is called once its keys are there.

        The client is told of errors, without any value.
        """
        try:
            evaluator = self._open(connection)
        except WorkerError as error:
            _tell(connection, error)
            return
        opened()
        try:
            while True:
                fields, words, _ = receive(connection, self._most(self._inputs()), None, MAX_REQUEST_HEADER_BYTES)
                expect(fields, "run")
                with self.turn:
                    self._run(connection, evaluator, words)
        except HecompileError as error:
            _tell(connection, error)
        finally:
            evaluator.close()

    def _open(self, connection: socket.socket) -> Evaluator:
        parameters = self.parameters
        fields, words, _ = receive(connection, parameters.evaluation_key_bytes, _ANSWER_SECONDS, MAX_REQUEST_HEADER_BYTES)
        expect(fields, "open")
        if fields.get("protocol") != PROTOCOL:
            raise WorkerError("the client speaks another version of this protocol; install the same hecompile on both")
        if fields.get("plan_id") != self.plan.plan_id:
            raise WorkerError("the worker's bundle is of another plan; start it on the one compiled with the client's")
        try:
            keys = EvaluationKeys(parameters, words)
        except InputError as error:
            raise WorkerError(str(error)) from None
        evaluator = Evaluator(keys, self.threads)
        send(connection, "ready")
        return evaluator

    def _inputs(self) -> int:
        return self.plan.sequence_length * self.plan.hidden

    def _most(self, count: int) -> int:
        return count * self.parameters.ciphertext_bytes(self.parameters.levels)

    def _run(self, connection: socket.socket, evaluator: Evaluator, words: np.ndarray) -> None:
        parameters, plan = self.parameters, self.plan
        top = parameters.levels
        inputs = _fresh(words, self._inputs(), parameters, top)
        shape = (1, plan.sequence_length, plan.hidden)
        tensor = CkksTensor(inputs, np.arange(len(inputs)).reshape(shape), top)

        def refresh(value: str, stale: CkksTensor) -> CkksTensor:
            sent = evaluator.truncated(stale)
            send(connection, "refresh", sent.words, value=value, level=stale.level)
            most = self._most(len(sent.words))
            fields, fresh, _ = receive(connection, most, _ANSWER_SECONDS, MAX_REQUEST_HEADER_BYTES)
            expect(fields, "fresh")
            return CkksTensor(_fresh(fresh, len(sent.words), parameters, top), sent.index, top)

        seconds: dict[str, float] = {}
        start = time.perf_counter()
        result = self.circuit.run(evaluator, {EMBEDDINGS: tensor}, refresh, seconds)
        last = evaluator.truncated(result)
        LOGGER.info("evaluated the circuit in %.1f s", time.perf_counter() - start)
        send(connection, "result", last.words, level=result.level, index=last.index.reshape(-1).tolist(), seconds=seconds)


def _fresh(words: np.ndarray, count: int, parameters: CkksParameters, level: int) -> np.ndarray:
    shape = (count, 2, parameters.primes(level), parameters.ring_dim)
    if words.shape != shape:
        raise WorkerError(f"ciphertexts of shape {list(shape)} are needed, got {list(words.shape)}")
    if not in_range(words, parameters.moduli):
        raise WorkerError("ciphertexts have words beyond their moduli")
    return words


def _tell(connection: socket.socket, error: Exception) -> None:
    LOGGER.warning("ended a session: %s", error)
    try:
        send(connection, "error", message=str(error))
    except OSError:
        LOGGER.info("the client had gone")


def serve(
    directory: str | Path,
    address: str,
    threads: int | None = None,
    *,
    ready: Callable[[str], None] = lambda address: None,
) -> None:
    """Serve a worker bundle at `tcp://127.0.0.1:port` or `unix:///path` until SIGTERM or SIGINT.

    The connection has neither TLS nor authentication: addresses that other machines can reach are refused; forward the port.

    ready: called once with the address that is listened on.
    Raises InputError for an address that is refused, and what `open_worker` raises.
    """
    worker, parsed = CkksWorker(directory, threads), parse_address(address)
    if isinstance(parsed, TcpAddress) and (parsed.scheme != "tcp" or not parsed.is_loopback):
        raise InputError(
            f"{address}: a polynomial worker listens on tcp://127.0.0.1:PORT or unix:// alone, for its connection has no "
            "authentication; forward the port over SSH"
        )

    class Handler(socketserver.BaseRequestHandler):
        request: socket.socket

        def handle(self) -> None:
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_TIMEOUT_SECONDS, 0))
            self.request.settimeout(_ANSWER_SECONDS)
            try:
                worker.serve(self.request, lambda: waits(self.server, self.request, False))
            except OSError as error:
                LOGGER.info("a session ended with %s", type(error).__name__)

    path = Path(parsed.path) if isinstance(parsed, UnixAddress) else None
    target = parsed.socket_address
    try:
        server = server_class(parsed)(target, Handler)
    except OSError as error:
        raise InputError(f"cannot listen on {address}: {reason_of(error)}") from None
    with server:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
        LOGGER.info("listening on %s, plan %s", _where(server, parsed), worker.plan.plan_id[:12])
        ready(_where(server, parsed))
        try:
            server.serve_forever(poll_interval=0.2)
        finally:
            server.end_connections()
            if path is not None:
                path.unlink(missing_ok=True)


def _where(server: socketserver.BaseServer, parsed: TcpAddress | UnixAddress) -> str:
    if isinstance(parsed, UnixAddress):
        return f"unix://{parsed.path}"
    address: Any = server.server_address
    return f"tcp://{address[0]}:{address[1]}"
