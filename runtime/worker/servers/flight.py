"""Serve a worker over Arrow Flight, the fastest network transport; see `hecompile.runtime.wire.flight_frames` for messages.

gRPC serves any number of connections, with any number of requests under way on each, in threads of its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hecompile.errors import HecompileError, InputError, WorkerError
from hecompile.files import reason_of
from hecompile.runtime.wire import framing, protocol
from hecompile.runtime.wire.address import TcpAddress, parse_address
from hecompile.runtime.wire.credentials import ServerCredentials
from hecompile.runtime.wire.flight_frames import COMMAND, flight, pyarrow, read_frame, write_frame
from hecompile.runtime.wire.framing import Frame
from hecompile.runtime.wire.network import FLIGHT_SCHEMES, check_server_access
from hecompile.runtime.worker.worker import Worker, handle

LOGGER = logging.getLogger(__name__)
MAX_REQUESTS = 64
"""Requests under way at once, of all clients; each takes a thread, and the memory of a request and its reply."""

STOP_SECONDS = 5.0
"""Time that clients have to finish sending requests and taking replies after the server was told to stop."""


class FlightWorkerServer:
    """Serve one worker; listens once made, and stops at the end of a `with`.

    Args:
        worker: answers the requests.
        address: `flight://host:port` or, over TLS, `flights://host:port` (port 0: any free one).
        credentials: the certificate for `flights`, and whom to serve.
        allow_plaintext_network: whether other machines may reach it without TLS.
        max_message_bytes: largest frame that is accepted.

    Raises:
        InputError: the address cannot be served, `credentials` do not fit it, or other machines can reach it without TLS
            and `allow_plaintext_network` is false.
    """

    def __init__(
        self,
        worker: Worker,
        address: str,
        *,
        credentials: ServerCredentials | None = None,
        allow_plaintext_network: bool = False,
        max_message_bytes: int = framing.MAX_MESSAGE_BYTES,
    ) -> None:
        credentials = credentials or ServerCredentials()
        self._parsed = _listening_address(address, credentials, allow_plaintext_network)
        location = f"{'grpc+tls' if self._parsed.tls else 'grpc'}://{self._parsed.authority}"
        options: dict[str, Any] = {"middleware": {"gate": _Gate(credentials)}}
        if self._parsed.tls:
            options["tls_certificates"] = [(credentials.certificate, credentials.key)]
        if credentials.client_authority is not None:
            options |= {"verify_client": True, "root_certificates": credentials.client_authority}
        self._calls = _Calls()
        try:
            self._server = _service(worker, max_message_bytes, self._calls)(location, **options)
        except (OSError, ValueError, pyarrow.ArrowException, flight.FlightError) as error:
            reason = _bind_failure(self._parsed) or str(error).partition(". Detail")[0]
            raise InputError(f"cannot listen on {address}: {reason}; free the address or choose another") from None

    @property
    def address(self) -> str:
        """Return the address that clients connect to, with the real port."""
        return f"{self._parsed.scheme}://{TcpAddress(self._parsed.host, self._server.port).authority}"

    def __enter__(self) -> FlightWorkerServer:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop accepting, let requests under way be answered, end the connections.

        A client that is still sending its request, or taking its reply, `STOP_SECONDS` after that is cut off.
        """
        stopping = threading.Thread(target=self._server.shutdown)  # waits for every call to end
        stopping.start()
        stopping.join(STOP_SECONDS)
        while stopping.is_alive():
            if self._calls.computing == 0:
                _end_connections(self._server.port)
            stopping.join(0.2)


class _Calls:
    """Count the calls under way, and those that compute."""

    def __init__(self) -> None:
        self.computing = 0
        self._free = threading.BoundedSemaphore(MAX_REQUESTS)
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Count one call. Raises FlightServerError when there are too many."""
        if not self._free.acquire(blocking=False):
            raise _refusal(f"the worker has {MAX_REQUESTS} requests under way; send fewer at a time")
        try:
            yield
        finally:
            self._free.release()

    @contextlib.contextmanager
    def compute(self) -> Iterator[None]:
        """Mark the part of a call that no client can prolong."""
        with self._lock:
            self.computing += 1
        try:
            yield
        finally:
            with self._lock:
                self.computing -= 1


def _service(worker: Worker, max_message_bytes: int, calls: _Calls) -> type[Any]:
    class Service(flight.FlightServerBase):
        """Answer the calls of Flight clients."""

        def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
            with calls.one():
                answer = self._answer(descriptor, reader)
                if isinstance(answer, str):
                    # Raised out here: Flight errors have no traceback on the wire, other exceptions do.
                    raise _refusal(answer)
                write_frame(writer, answer)

        def _answer(self, descriptor: Any, reader: Any) -> Frame | str:
            """Return the reply, or why there is none."""
            try:
                if descriptor.command != COMMAND:
                    raise WorkerError(f"unknown command; this worker answers {COMMAND.decode()}")
                frame = read_frame(reader, max_message_bytes, framing.MAX_REQUEST_HEADER_BYTES)
                if frame is None:
                    raise WorkerError("malformed message: the call ended without a request")
                with calls.compute():
                    request_id, request = protocol.decode_request(frame)
                    return protocol.encode(handle(request, worker), request_id)
            except HecompileError as error:
                LOGGER.warning("refused a request: %s", error)
                return str(error)[: protocol.MAX_ERROR_CHARACTERS]
            except (pyarrow.ArrowException, flight.FlightError, OSError) as error:
                LOGGER.info("a request did not arrive whole: %s", type(error).__name__)
                return "malformed message: it is no Arrow record batch, or did not arrive whole"
            except Exception as error:
                # Neither the text nor the traceback is sent: they may quote values of the payload.
                LOGGER.error("a request failed with %s", type(error).__name__)
                return f"the worker failed with {type(error).__name__}"

    return Service


class _Gate(flight.ServerMiddlewareFactory):
    """Refuse a call, before anything of it is read, unless it is a DoExchange with a known token.

    pyarrow refuses other methods as well, but would send the client a traceback.
    """

    def __init__(self, credentials: ServerCredentials) -> None:
        super().__init__()
        self._credentials = credentials

    def start_call(self, info: Any, headers: dict[str, list[str]]) -> None:
        values = headers.get("authorization", [])
        if not self._credentials.accepts(values[0] if len(values) == 1 else None):
            LOGGER.warning("refused a call without a known token")
            raise flight.FlightUnauthenticatedError("this worker needs a bearer token that it knows")
        if info.method != flight.FlightMethod.DO_EXCHANGE:
            raise _refusal("a hecompile worker answers DoExchange and no other call")


def _refusal(text: str) -> Exception:
    """Make the error of a refused call; it carries the text twice, once without pyarrow's additions."""
    error: Exception = flight.FlightServerError(text, extra_info=text.encode())
    return error


def _listening_address(address: str, credentials: ServerCredentials, allow_plaintext_network: bool) -> TcpAddress:
    parsed = parse_address(address)
    if not isinstance(parsed, TcpAddress) or parsed.scheme not in FLIGHT_SCHEMES:
        raise InputError(f"{address} is no address of Arrow Flight; needs flight://host:port or flights://host:port")
    check_server_access(parsed, credentials, allow_plaintext_network)
    if parsed.tls and not parsed.is_loopback and not credentials.authenticates:
        LOGGER.warning(
            "everybody who reaches %s is served: neither tokens nor client certificates are required. Arrow unpacks what "
            "they send before its size is checked; require tokens or certificates, or listen on grpcs://", address,
        )  # fmt: skip
    return parsed


def _bind_failure(address: TcpAddress) -> str | None:
    """Return the system's reason why `address` cannot be listened on, which gRPC does not give; None where it can be."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address.socket_address)
            probe.listen()
    except OSError as error:
        return reason_of(error)
    return None


def _end_connections(port: int) -> None:
    """Shut down this process's sockets on local port `port`: gRPC has no call that ends a client's stream from here."""
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            if file.is_socket():
                with socket.socket(fileno=os.dup(int(file.name))) as connection:
                    internet = connection.family in (socket.AF_INET, socket.AF_INET6)
                    if internet and connection.getsockname()[1] == port:
                        connection.shutdown(socket.SHUT_RDWR)
