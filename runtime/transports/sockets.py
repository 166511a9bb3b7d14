"""Reach a worker over a TCP or Unix socket, and any worker by the scheme of its address."""

from __future__ import annotations

import socket

from hecompile.errors import InputError, WorkerError, WorkerUnavailableError
from hecompile.files import reason_of
from hecompile.runtime.transports.base import FrameTransport, TrafficRecorder, Transport
from hecompile.runtime.transports.pool import TransportPool
from hecompile.runtime.wire import framing
from hecompile.runtime.wire.address import TcpAddress, parse_address
from hecompile.runtime.wire.credentials import ClientCredentials
from hecompile.runtime.wire.framing import Frame
from hecompile.runtime.wire.network import FLIGHT_SCHEMES, OIP_SCHEMES, load_network_module


class SocketTransport(FrameTransport):
    """Carry one request at a time over a socket; connects when made.

    After a failure the connection is closed and stays so: a stream broken in mid-message cannot be read on.

    Args:
        address: `tcp://host:port` or `unix:///path`.
        connect_timeout: seconds.
        reply_timeout: the longest silence, in seconds, while a request is answered. A reply that has begun must come at
            `framing.SLOWEST_BYTES_PER_SECOND` besides, or at most so many seconds later.

    Raises:
        InputError: the address is malformed.
        WorkerUnavailableError: nothing answers there.
    """

    def __init__(
        self,
        address: str,
        *,
        connect_timeout: float = 10.0,
        reply_timeout: float = 600.0,
        max_message_bytes: int = framing.MAX_MESSAGE_BYTES,
        recorder: TrafficRecorder | None = None,
    ) -> None:
        super().__init__(recorder)
        self._address = address
        self._reply_timeout = reply_timeout
        self._max_message_bytes = max_message_bytes
        self._socket: socket.socket | None = _open(address, connect_timeout)

    def _exchange(self, frame: Frame) -> Frame:
        if self._socket is None:
            raise WorkerUnavailableError(f"the connection to the worker at {self._address} is closed; connect again")
        if frame.size > self._max_message_bytes:
            raise WorkerError(
                f"request of {frame.size} bytes; at most {self._max_message_bytes} are sent; use a smaller batch"
            )
        answer = None
        try:
            self._socket.settimeout(self._reply_timeout)
            framing.send_frame(self._socket, frame)
            answer = framing.receive_frame(self._socket, self._max_message_bytes, self._reply_timeout)
        except TimeoutError as error:
            raise WorkerUnavailableError(
                f"the worker at {self._address} was silent for {self._reply_timeout:g} s; "
                "see its log, or raise the reply timeout for a slow machine"
            ) from error
        except OSError as error:
            raise WorkerUnavailableError(
                f"the connection to the worker at {self._address} broke: {reason_of(error)}"
            ) from error
        except WorkerError as error:
            raise type(error)(f"worker at {self._address}: {error}") from error
        finally:
            if answer is None:
                self.close()
        if answer is None:
            raise WorkerUnavailableError(
                f"the worker at {self._address} closed the connection without an answer; see its log"
            )
        return answer

    def close(self) -> None:
        """See `Transport.close`."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def connect(
    address: str,
    *,
    credentials: ClientCredentials | None = None,
    recorder: TrafficRecorder | None = None,
    reply_timeout: float = 600.0,
) -> Transport:
    """Return a transport to the worker at `address`, by its scheme.

    See `SocketTransport`, `hecompile.runtime.transports.oip` and `hecompile.runtime.transports.flight`. `inprocess` has no
    address: the caller makes an `InProcessTransport` of its own worker.
    """
    if address == "inprocess":
        raise InputError("an embedded worker is not connected to by address: make an InProcessTransport of it")
    parsed = parse_address(address)
    if isinstance(parsed, TcpAddress) and parsed.scheme in OIP_SCHEMES:
        transport: Transport = load_network_module("hecompile.runtime.transports.oip").OipTransport(
            address, credentials=credentials, recorder=recorder, reply_timeout=reply_timeout
        )
        return transport
    if isinstance(parsed, TcpAddress) and parsed.scheme in FLIGHT_SCHEMES:
        flight: Transport = load_network_module("hecompile.runtime.transports.flight").FlightTransport(
            address, recorder=recorder, reply_timeout=reply_timeout, credentials=credentials
        )
        return flight
    if credentials is not None and credentials != ClientCredentials():
        raise InputError(f"worker address {address!r}: sockets have neither TLS nor tokens; connect to grpcs:// or flights://")
    return SocketTransport(address, recorder=recorder, reply_timeout=reply_timeout)


def connect_for(
    address: str, in_flight: int, credentials: ClientCredentials | None = None, reply_timeout: float = 600.0
) -> Transport:
    """Return a transport to the worker at `address` that takes `in_flight` requests at once.

    One connection where it carries them all, else a pool of connections. See `connect`.
    """
    parsed = parse_address(address)
    if isinstance(parsed, TcpAddress) and parsed.scheme in OIP_SCHEMES:  # Flight is faster over several connections
        return connect(address, credentials=credentials, reply_timeout=reply_timeout)
    return TransportPool(lambda: connect(address, credentials=credentials, reply_timeout=reply_timeout), in_flight)


def _open(address: str, timeout: float) -> socket.socket:
    parsed = parse_address(address)
    try:
        if isinstance(parsed, TcpAddress):
            connection = socket.create_connection(parsed.socket_address, timeout)
            # A request is two writes; without this the second may wait for the acknowledgement of the first.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout)
            connection.connect(parsed.socket_address)
        except OSError:
            connection.close()
            raise
        return connection
    except OSError as error:
        raise WorkerUnavailableError(
            f"no worker answers at {address}: {reason_of(error)}; start one with `hecompile worker serve`"
        ) from error
