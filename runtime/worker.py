"""The worker: public circuits and an engine. `handle` is the whole of its behaviour; the server only moves frames."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import socketserver
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hecompile.errors import HecompileError, InputError, WorkerError
from hecompile.public_rows import exact_name
from hecompile.worker_bundle import WorkerBundle
from runtime import protocol
from runtime.engines import DEFAULT_ENGINE, create_engine
from runtime.engines.base import Engine
from runtime.protocol import ErrorReply, EvaluateReply, EvaluateRequest, Frame, HelloRequest, Reply, Request, WorkerInfo
from runtime.transports.address import TcpAddress, UnixAddress, parse_address
from runtime.transports.credentials import ServerCredentials

LOGGER = logging.getLogger(__name__)
SEND_TIMEOUT_SECONDS = 60
"""A client that takes nothing of its reply for so long is given up, and does not hold up a shutdown."""

DRAIN_SECONDS, DRAIN_BYTES = 1.0, 1 << 20


class Worker:
    """A bundle and the engine that evaluates it: immutable once made, no state between requests.

    engine: a name of `runtime.engines.ENGINES`, or an engine made already.
    """

    def __init__(self, bundle: WorkerBundle, engine: str | Engine = DEFAULT_ENGINE) -> None:
        self.bundle = bundle
        self.engine: Engine = create_engine(engine, bundle) if isinstance(engine, str) else engine
        self._public_rows = bundle.public_rows() if bundle.has_public_rows else None

    def setup_product(self, circuit: str) -> tuple[str, np.ndarray]:
        """What to evaluate for the hint of `circuit`: its exact form, and as many of the public rows as it has inputs.

        Raises WorkerError when the bundle cannot make hints, or has no such circuit.
        """
        name = exact_name(circuit)
        spec = self.bundle.circuits.get(name)
        if self._public_rows is None or spec is None:
            raise WorkerError(
                f"the worker bundle cannot compute the hint of {circuit!r}: only one that was exported with --no-hints can"
            )
        return name, np.ascontiguousarray(self._public_rows[:, :, : spec.in_features])

    def exchange(self, frame: Frame) -> Frame:
        """Answer one frame with one frame; every failure becomes an error frame."""
        request_id = 0
        try:
            request_id, request = protocol.decode_request(frame)
            return protocol.encode(handle(request, self), request_id)
        except HecompileError as error:
            LOGGER.warning("refused a request: %s", error)
            return protocol.encode(ErrorReply(str(error)), request_id)
        except Exception as error:
            # Neither the text nor the traceback is sent: they may quote values of the payload.
            LOGGER.error("a request failed with %s", type(error).__name__)
            return protocol.encode(ErrorReply(f"the worker failed with {type(error).__name__}"), request_id)


def handle(request: Request, state: Worker) -> Reply:
    """The answer to one request; depends on nothing but its arguments. Raises WorkerError to refuse."""
    bundle = state.bundle
    if isinstance(request, HelloRequest):
        if request.protocol != protocol.PROTOCOL_VERSION:
            raise WorkerError(
                f"the client speaks protocol {request.protocol}, this worker {protocol.PROTOCOL_VERSION}; "
                "install the same version of hecompile on both"
            )
        if request.plan_id != bundle.plan_id:
            raise WorkerError(
                f"worker bundle is of another plan: expected {request.plan_id}, got {bundle.plan_id}; "
                "start the worker on the bundle that was compiled together with the client's"
            )
        circuits = {
            name: protocol.CircuitInfo(spec.upload_limbs, spec.in_features, spec.reply_bytes, spec.out_features)
            for name, spec in bundle.circuits.items()
        }
        return WorkerInfo(bundle.plan_id, state.engine.name, circuits)
    circuit, planes = (
        (request.circuit, request.planes) if isinstance(request, EvaluateRequest) else state.setup_product(request.circuit)
    )
    tokens = planes.shape[1]
    start = time.perf_counter()
    planes = state.engine.evaluate(circuit, planes)
    seconds = time.perf_counter() - start
    LOGGER.debug("evaluated %s for %d tokens in %.4f s", circuit, tokens, seconds)
    return EvaluateReply(planes, seconds)


class WorkerServer:
    """Serves one worker on a socket, each client in a thread of its own.

    address: `tcp://host:port` (port 0: any free one) or `unix:///path`. An address that other machines can reach is
    refused unless `allow_plaintext_network`: ciphertexts are safe to show, but the connection has no authentication,
    and who changes replies stops the training. Raises InputError for an address that cannot be served.
    """

    def __init__(
        self,
        worker: Worker,
        address: str,
        *,
        allow_plaintext_network: bool = False,
        max_message_bytes: int = protocol.MAX_MESSAGE_BYTES,
    ) -> None:
        parsed = parse_address(address)
        if isinstance(parsed, TcpAddress) and not parsed.is_loopback and not allow_plaintext_network:
            raise InputError(
                f"{address} can be reached from other machines without authentication; listen on 127.0.0.1 and forward "
                "the port over SSH, or pass allow_plaintext_network"
            )
        self._unix_path = Path(parsed.path) if isinstance(parsed, UnixAddress) else None
        server_class = _server_class(parsed)
        try:
            self._server = server_class(parsed.socket_address, _handler_class(worker, max_message_bytes))
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(f"cannot listen on {address}: {reason}; free the address or choose another") from error
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1})

    @property
    def address(self) -> str:
        """The address that clients connect to, with the real port."""
        if self._unix_path is not None:
            return f"unix://{self._unix_path}"
        host, port = self._server.socket.getsockname()[:2]
        return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"

    def __enter__(self) -> WorkerServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop accepting, let requests under way be answered, end the connections."""
        self._server.shutdown()
        self._thread.join()
        self._server.end_connections()
        self._server.server_close()  # waits for the connections' threads
        if self._unix_path is not None:
            self._unix_path.unlink(missing_ok=True)


def serve(
    worker: Worker,
    address: str,
    *,
    ready: Callable[[str], None] = lambda address: None,
    stop: threading.Event | None = None,
    allow_plaintext_network: bool = False,
    max_message_bytes: int = protocol.MAX_MESSAGE_BYTES,
    credentials: ServerCredentials | None = None,
) -> None:
    """Serve until SIGINT, SIGTERM (both only when called in the main thread) or `stop`.

    ready: called once with the address that is listened on. Raises InputError as the server of the address's scheme.
    """
    from runtime.servers import open_server  # which imports this module

    stopped = stop or threading.Event()
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, lambda *_: stopped.set())
    try:
        with open_server(
            worker,
            address,
            allow_plaintext_network=allow_plaintext_network,
            max_message_bytes=max_message_bytes,
            credentials=credentials,
        ) as server:
            LOGGER.info("worker with engine %s listens on %s", worker.engine.name, server.address)
            ready(server.address)
            stopped.wait()
            LOGGER.info("worker on %s stops", server.address)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _handler_class(worker: Worker, max_message_bytes: int) -> type[socketserver.BaseRequestHandler]:
    class Handler(socketserver.BaseRequestHandler):
        """One client's connection."""

        request: socket.socket

        def setup(self) -> None:
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_TIMEOUT_SECONDS, 0))
            if self.request.family != socket.AF_UNIX:
                # A reply is two writes; without this the second may wait for the acknowledgement of the first.
                self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def handle(self) -> None:
            try:
                while (frame := protocol.receive_frame(self.request, max_message_bytes)) is not None:
                    protocol.send_frame(self.request, worker.exchange(frame))
            except WorkerError as error:
                # The stream cannot be read on: say why, and end this connection alone.
                LOGGER.warning("ended a connection: %s", error)
                protocol.send_frame(self.request, protocol.encode(ErrorReply(str(error)), 0))
                _drain(self.request)

    return Handler


def _drain(connection: socket.socket) -> None:
    """Read away what the client has sent already: closing on unread bytes would discard the error frame."""
    connection.shutdown(socket.SHUT_WR)
    connection.settimeout(DRAIN_SECONDS)
    remaining = DRAIN_BYTES
    while remaining > 0 and (chunk := connection.recv(min(remaining, 65536))):
        remaining -= len(chunk)


class _ConnectionsMixin(socketserver.ThreadingMixIn):
    """Threads that `server_close` waits for, and connections that can be ended from outside."""

    daemon_threads = False
    block_on_close = True

    def __init__(self, *arguments: Any) -> None:
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        # Here and not in the thread: this runs in the accepting loop, so that no connection is missed at the end.
        with self._lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)  # closes the connection
        finally:
            with self._lock:
                self._connections.discard(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        LOGGER.info("a connection ended with %s", type(sys.exception()).__name__)

    def end_connections(self) -> None:
        """No more requests are read; a reply under way is still sent."""
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):  # closed by its client or its thread meanwhile
                    connection.shutdown(socket.SHUT_RD)


class _TcpServer(_ConnectionsMixin, socketserver.TCPServer):
    allow_reuse_address = True


class _Tcp6Server(_TcpServer):
    address_family = socket.AF_INET6


class _UnixServer(_ConnectionsMixin, socketserver.UnixStreamServer):
    pass


def _server_class(address: TcpAddress | UnixAddress) -> type[_TcpServer] | type[_UnixServer]:
    if isinstance(address, UnixAddress):
        return _UnixServer
    return _Tcp6Server if ":" in address.host else _TcpServer
