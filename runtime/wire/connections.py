"""Serve each connection in a thread of its own, and bound what one of them can hold up.

A client may be silent between two messages for as long as it likes (it is computing); TCP's keep-alive finds out whether its
machine is still there. A message that has begun and stands still is given up with its connection.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import socketserver
import struct
import sys
import threading
from collections.abc import Callable
from typing import Any

from hecompile.errors import WorkerError
from hecompile.runtime.wire.address import TcpAddress, UnixAddress
from hecompile.runtime.wire.framing import Frame, receive_frame, send_frame
from hecompile.runtime.wire.protocol import ErrorReply, encode

LOGGER = logging.getLogger(__name__)
SEND_TIMEOUT_SECONDS = 60
"""Time after which a client that takes nothing of its reply is given up; it does not hold up a shutdown."""

RECEIVE_TIMEOUT_SECONDS = 60.0
"""Time without a byte after which a message that has begun is given up with its connection."""

KEEPALIVE_SECONDS = 60
"""Time without traffic after which the other machine is probed, and given up if it does not answer."""

MAX_CONNECTIONS = 256
"""Clients at once, each in a thread; the next is told so and turned away."""

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
                while (frame := receive_frame(self.request, max_message_bytes, RECEIVE_TIMEOUT_SECONDS)) is not None:
                    send_frame(self.request, exchange(frame))
            except WorkerError as error:
                # The stream cannot be read on: say why, and end this connection alone.
                _refuse(self.request, error)

    return Handler


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


class _ConnectionsMixin(socketserver.ThreadingMixIn):
    """Keep the connections of a server, so that they can be ended from outside; `server_close` waits for their threads."""

    daemon_threads = False
    block_on_close = True
    shutdown_request: Callable[[Any], None]

    def __init__(self, *arguments: Any) -> None:
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        # Here and not in the thread: this runs in the accepting loop, so that no connection is missed at the end.
        with self._lock:
            full = len(self._connections) >= MAX_CONNECTIONS
            if not full:
                self._connections.add(request)
        if full:
            busy = WorkerError(f"the worker serves {MAX_CONNECTIONS} connections already; try again later")
            with contextlib.suppress(OSError):  # the frame is small: it fits in what the kernel holds for a new connection
                request.settimeout(DRAIN_SECONDS)
                send_frame(request, encode(ErrorReply(str(busy)), 0))
            LOGGER.warning("turned a connection away: %s", busy)
            self.shutdown_request(request)
            return
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
