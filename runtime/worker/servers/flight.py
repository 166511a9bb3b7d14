"""Serve a worker over Arrow Flight; see `hecompile.runtime.wire.flight_frames` for the messages.

gRPC serves any number of connections, with any number of requests under way on each.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc

from hecompile.errors import HecompileError, InputError, WorkerError
from hecompile.files import reason_of
from hecompile.runtime.wire import framing, protocol
from hecompile.runtime.wire.address import TcpAddress, parse_address
from hecompile.runtime.wire.credentials import ServerCredentials
from hecompile.runtime.wire.flight_frames import METHOD, OPTIONS, SERVICE, FrameReader, limits, reply_messages
from hecompile.runtime.wire.framing import Frame
from hecompile.runtime.wire.network import FLIGHT_SCHEMES, check_server_access
from hecompile.runtime.worker.servers.grpc_listening import NOT_SHARED, listen
from hecompile.runtime.worker.worker import Worker, handle

LOGGER = logging.getLogger(__name__)
MAX_REQUESTS = 64
"""Requests under way at once, of all clients; each takes a thread, and the memory of a request and its reply."""

_REFUSALS = 8
"""Threads beside these, which tell further clients so."""

_LONGEST_COMPUTATION = 86_400.0
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
        self._service = _Service(worker, max_message_bytes)
        self._threads = ThreadPoolExecutor(MAX_REQUESTS + _REFUSALS, thread_name_prefix="flight")
        self._server = grpc.server(
            self._threads,
            handlers=(_Gate(self._service, credentials),),
            options=(*OPTIONS, *limits(max_message_bytes), NOT_SHARED),
            maximum_concurrent_rpcs=MAX_REQUESTS + _REFUSALS,
        )
        try:
            self._port = listen(self._server, self._parsed, credentials)
        except RuntimeError:  # all that gRPC says of a socket that it cannot bind
            reason = _bind_failure(self._parsed) or "gRPC cannot bind it"
            raise InputError(f"cannot listen on {address}: {reason}; free the address or choose another") from None
        self._server.start()

    @property
    def address(self) -> str:
        """Return the address that clients connect to, with the real port."""
        return f"{self._parsed.scheme}://{TcpAddress(self._parsed.host, self._port).authority}"

    def __enter__(self) -> FlightWorkerServer:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop accepting, let requests under way be answered, end the connections.

        A client that is still sending its request, or taking its reply, `STOP_SECONDS` after that is cut off.
        """
        ended = self._server.stop(_LONGEST_COMPUTATION)
        ended.wait(STOP_SECONDS)
        while not ended.wait(0.2):
            if self._service.computing == 0:
                self._server.stop(None)
        self._threads.shutdown()


class _Service:
    """Answer calls, and count those that compute."""

    def __init__(self, worker: Worker, max_message_bytes: int) -> None:
        self.computing = 0
        self._worker, self._max_message_bytes = worker, max_message_bytes
        self._free = threading.BoundedSemaphore(MAX_REQUESTS)
        self._lock = threading.Lock()

    def exchange(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Return the messages of the reply to those of a request."""
        if not self._free.acquire(blocking=False):
            _refuse(context, f"the worker has {MAX_REQUESTS} requests under way; send fewer at a time")
        try:
            answer = self._answer(messages)
            if isinstance(answer, str):
                _refuse(context, answer)
            else:
                yield from reply_messages(answer)
        finally:
            self._free.release()

    def _answer(self, messages: Iterator[bytes]) -> Frame | str:
        """Return the reply, or why there is none."""
        try:
            frame = FrameReader(messages, self._max_message_bytes, framing.MAX_REQUEST_HEADER_BYTES).first_of_call()
            if frame is None:
                raise WorkerError("malformed message: the call ended without a request")
            with self._computing():
                request_id, request = protocol.decode_request(frame)
                return protocol.encode(handle(request, self._worker), request_id)
        except HecompileError as error:
            LOGGER.warning("refused a request: %s", error)
            return str(error)[: protocol.MAX_ERROR_CHARACTERS]
        except grpc.RpcError:
            LOGGER.info("a request did not arrive whole")
            return "malformed message: it did not arrive whole"
        except Exception as error:
            # Neither the text nor the traceback is sent: they may quote values of the payload.
            LOGGER.error("a request failed with %s", type(error).__name__)
            return f"the worker failed with {type(error).__name__}"

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """Mark the part of a call that no client can prolong."""
        with self._lock:
            self.computing += 1
        try:
            yield
        finally:
            with self._lock:
                self.computing -= 1


class _Gate(grpc.GenericRpcHandler):
    """Refuse a call, before any of its messages is read, unless it is a DoExchange with a known token."""

    def __init__(self, service: _Service, credentials: ServerCredentials) -> None:
        self._credentials = credentials
        self._answered = grpc.stream_stream_rpc_method_handler(service.exchange)
        # These handlers too are of a kind that is called before a message has come: a stranger fills no memory.
        self._unknown = grpc.stream_stream_rpc_method_handler(_refuse_stranger)
        self._other = grpc.stream_stream_rpc_method_handler(_refuse_other_call)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        """Choose what answers a call."""
        sent = [value for key, value in details.invocation_metadata if key == "authorization"]
        if not self._credentials.accepts(sent[0] if len(sent) == 1 else None):
            LOGGER.warning("refused a call without a known token")
            return self._unknown
        return self._answered if details.method == f"/{SERVICE}/{METHOD}" else self._other


def _refuse_stranger(_: object, context: grpc.ServicerContext) -> None:
    context.abort(grpc.StatusCode.UNAUTHENTICATED, "this worker needs a bearer token that it knows")


def _refuse_other_call(_: object, context: grpc.ServicerContext) -> None:
    _refuse(context, "a hecompile worker answers DoExchange and no other call")


def _refuse(context: grpc.ServicerContext, text: str) -> None:
    """End a call with a text, by raising; clients of Arrow Flight show this status as the server's own error."""
    context.abort(grpc.StatusCode.UNKNOWN, text)


def _listening_address(address: str, credentials: ServerCredentials, allow_plaintext_network: bool) -> TcpAddress:
    parsed = parse_address(address)
    if not isinstance(parsed, TcpAddress) or parsed.scheme not in FLIGHT_SCHEMES:
        raise InputError(f"{address} is no address of Arrow Flight; needs flight://host:port or flights://host:port")
    check_server_access(parsed, credentials, allow_plaintext_network)
    if parsed.tls and not parsed.is_loopback and not credentials.authenticates:
        LOGGER.warning(
            "everybody who reaches %s is served: neither tokens nor client certificates are required", address
        )
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
