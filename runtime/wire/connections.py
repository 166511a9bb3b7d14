"""Serve each connection in a thread of its own, and bound what one of them can hold up.

A client may be silent between two messages for as long as it likes (it is computing); TCP's keep-alive finds out whether its
machine is still there. A message that has begun and stands still is given up with its connection.
"""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import socketserver
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hecompile.errors import WorkerError
from hecompile.runtime.wire import framing
from hecompile.runtime.wire.address import TcpAddress, UnixAddress
from hecompile.runtime.wire.framing import Frame, receive_frame, send_frame
from hecompile.runtime.wire.protocol import ErrorReply, encode

LOGGER = logging.getLogger(__name__)
SEND_TIMEOUT_SECONDS = 60
"""Time after which a client that takes nothing of its reply is given up; it does not hold up a shutdown."""

RECEIVE_TIMEOUT_SECONDS = 60.0
"""Time without a byte after which a message that has begun is given up with its connection."""

FIRST_MESSAGE_SECONDS = 20.0
"""Time in which a new connection must begin its first message: whoever connects has something to ask."""

IDLE_SECONDS = 120.0
"""Time between two messages after which a connection may be ended, where its place is wanted."""

KEEPALIVE_SECONDS = 60
"""Time without traffic after which the other machine is probed, and given up if it does not answer."""

MAX_CONNECTIONS = 256
"""Clients at once, each in a thread. The next takes the place of a silent one, or is told so and turned away."""

DRAIN_SECONDS, DRAIN_BYTES = 1.0, 1 << 20

Exchange = Callable[[Frame], Frame]


def handler_class(exchange: Exchange, max_message_bytes: int) -> type[socketserver.BaseRequestHandler]:
    """Make the class that answers each frame of a connection with the one that `exchange` returns for it."""

    class Handler(socketserver.BaseRequestHandler):
        """Serve one client's connection."""

        request: socket.socket

        def setup(self) -> None:
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_TIMEOUT_SECONDS, 0))
            if self.request.family != socket.AF_UNIX:
                # A reply is two writes; without this the second may wait for the acknowledgement of the first.
                self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.request.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_SECONDS)
                self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_SECONDS // 4)

        def handle(self) -> None:
            try:
                while (frame := self._receive()) is not None:
                    send_frame(self.request, exchange(frame))
                    waits(self.server, self.request, True)
            except WorkerError as error:
                # The stream cannot be read on: say why, and end this connection alone.
                _refuse(self.request, error)

        def _receive(self) -> Frame | None:
            frame = receive_frame(
                self.request, max_message_bytes, RECEIVE_TIMEOUT_SECONDS, framing.MAX_REQUEST_HEADER_BYTES
            )
            waits(self.server, self.request, False)
            return frame

    return Handler


def waits(server: socketserver.BaseServer, connection: socket.socket, waiting: bool) -> None:
    """Note that the next message of a connection is waited for from now on, or that one has come and is answered."""
    if isinstance(server, _ConnectionsMixin):
        server.waiting(connection, waiting)


def _refuse(connection: socket.socket, error: WorkerError) -> None:
    """Send the reason why nothing more is read of a connection."""
    LOGGER.warning("ended a connection: %s", error)
    send_frame(connection, encode(ErrorReply(str(error)), 0))
    _drain(connection)


def _drain(connection: socket.socket) -> None:
    """Read away what the client has sent already: closing on unread bytes would discard the error frame."""
    connection.shutdown(socket.SHUT_WR)
    connection.settimeout(DRAIN_SECONDS)
    remaining = DRAIN_BYTES
    while remaining > 0 and (chunk := connection.recv(min(remaining, 65536))):
        remaining -= len(chunk)


@dataclass(frozen=True)
class _Waiting:
    """Hold since when the next message of a connection is waited for, infinity while one is answered.

    spoken: whether it has ever sent one.
    """

    since: float
    spoken: bool


class _ConnectionsMixin(socketserver.ThreadingMixIn):
    """Keep the connections of a server, so that they can be ended from outside; `server_close` waits for their threads."""

    request_queue_size = 128
    daemon_threads = False
    block_on_close = True
    shutdown_request: Callable[[Any], None]

    def __init__(self, *arguments: Any) -> None:
        self._connections: dict[socket.socket, _Waiting] = {}
        self._lock = threading.Lock()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        # Here and not in the thread: this runs in the accepting loop, so that no connection is missed at the end.
        with self._lock:
            full = len(self._connections) >= MAX_CONNECTIONS and not self._make_room()
            if not full:
                self._connections[request] = _Waiting(time.monotonic(), spoken=False)
        if full:
            busy = WorkerError(f"the worker serves {MAX_CONNECTIONS} connections already; try again later")
            with contextlib.suppress(OSError):  # the frame is small: it fits in what the kernel holds for a new connection
                request.settimeout(DRAIN_SECONDS)
                send_frame(request, encode(ErrorReply(str(busy)), 0))
            LOGGER.warning("turned a connection away: %s", busy)
            self.shutdown_request(request)
            return
        request.settimeout(FIRST_MESSAGE_SECONDS)  # until the first message has come
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)  # closes the connection
        finally:
            with self._lock:
                self._connections.pop(request, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        LOGGER.info("a connection ended with %s", type(sys.exception()).__name__)

    def waiting(self, connection: socket.socket, waiting: bool) -> None:
        """See `waits`."""
        with self._lock:
            if connection in self._connections:
                self._connections[connection] = _Waiting(time.monotonic() if waiting else math.inf, spoken=True)

    def _make_room(self) -> bool:
        """End the connection that has waited longest among those that may be ended; tell whether there was one."""
        now = time.monotonic()
        ends = [one for one, state in self._connections.items() if now - state.since > (IDLE_SECONDS if state.spoken else 0)]
        if not ends:
            return False
        chosen = min(ends, key=lambda one: (self._connections[one].spoken, self._connections[one].since))
        del self._connections[chosen]  # its thread ends as soon as it finds out
        LOGGER.info("ended a connection that was silent: another wants its place")
        with contextlib.suppress(OSError):
            chosen.shutdown(socket.SHUT_RDWR)
        return True

    def end_connections(self) -> None:
        """Read no more requests; a reply under way is still sent."""
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


def server_class(address: TcpAddress | UnixAddress) -> type[_TcpServer] | type[_UnixServer]:
    """Return the class of server that listens on `address`."""
    if isinstance(address, UnixAddress):
        return _UnixServer
    return _Tcp6Server if ":" in address.host else _TcpServer
