"""Serve a worker by Open Inference Protocol v2 over gRPC: the socket, TLS, tokens, and limits on requests under way."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc

from hecompile.errors import InputError
from hecompile.runtime.wire import framing
from hecompile.runtime.wire.address import TcpAddress
from hecompile.runtime.wire.connections import SEND_TIMEOUT_SECONDS
from hecompile.runtime.wire.credentials import ServerCredentials
from hecompile.runtime.wire.inference_protocol import UNCOMPRESSED
from hecompile.runtime.wire.network import check_server_access
from hecompile.runtime.worker.servers.grpc_listening import NOT_SHARED, listen
from hecompile.runtime.worker.servers.oip_service import OipService
from hecompile.runtime.worker.worker import Worker

LOGGER = logging.getLogger(__name__)
THREADS = 8
"""Requests computed at once; a worker has few cores, so that more would only take more memory."""

MAX_REQUESTS = 32
"""Requests under way at once, including those that wait for a thread; the next is refused with RESOURCE_EXHAUSTED."""


class OipServer:
    """Serve one worker; listens when made, serves while entered.

    Args:
        worker: answers the requests.
        address: of scheme `grpc` or `grpcs` (port 0: any free one).
        credentials: a certificate and key with `grpcs`. With a client authority, clients need a certificate that it signed;
            with tokens, every call must carry one.
        allow_plaintext_network: whether other machines may reach it without TLS.
        max_message_bytes: largest message that is accepted.
        max_requests: requests under way at once.

    Raises:
        InputError: the address cannot be served, or must not be.
    """

    def __init__(
        self,
        worker: Worker,
        address: TcpAddress,
        *,
        credentials: ServerCredentials | None = None,
        allow_plaintext_network: bool = False,
        max_message_bytes: int = framing.MAX_MESSAGE_BYTES,
        max_requests: int = MAX_REQUESTS,
    ) -> None:
        credentials = credentials or ServerCredentials()
        check_server_access(address, credentials, allow_plaintext_network)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="oip")
        self._server = grpc.server(
            self._threads,
            interceptors=(_TokenCheck(credentials),) if credentials.token_digests else (),
            options=(
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", max_message_bytes),
                UNCOMPRESSED,
                NOT_SHARED,
            ),
            maximum_concurrent_rpcs=max_requests,
        )
        self._server.add_generic_rpc_handlers((OipService(worker).handlers(),))
        try:
            port = listen(self._server, address, credentials)
        except RuntimeError as error:  # all that gRPC says of a socket that it cannot bind
            raise InputError(
                f"cannot listen on {address.scheme}://{address.authority}: the address is in use or not of this machine; "
                "free it or choose another"
            ) from error
        self._address = TcpAddress(address.host, port, address.scheme)
        if not credentials.authenticates and not address.is_loopback:
            LOGGER.warning("%s serves every machine: it requires no token or client certificate", self.address)

    @property
    def address(self) -> str:
        """Return the address that clients connect to, with the real port."""
        return f"{self._address.scheme}://{self._address.authority}"

    def __enter__(self) -> OipServer:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop accepting, let requests under way be answered, end the connections."""
        self._server.stop(SEND_TIMEOUT_SECONDS).wait()
        self._threads.shutdown()


class _TokenCheck(grpc.ServerInterceptor):
    """Refuse every call without a known token, before any of its message is read."""

    def __init__(self, credentials: ServerCredentials) -> None:
        self._credentials = credentials

        def refuse(_: object, context: grpc.ServicerContext) -> None:
            context.abort(
                grpc.StatusCode.UNAUTHENTICATED, "a token that the worker knows is needed (authorization: Bearer)"
            )

        # This kind of handler is called before a message has come: an unknown client fills no memory.
        self._refusal = grpc.stream_unary_rpc_method_handler(refuse)

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler | None],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        sent = [value for key, value in details.invocation_metadata if key == "authorization"]
        if len(sent) == 1 and self._credentials.accepts(sent[0]):
            return continuation(details)
        LOGGER.warning("refused a call without a token that is known")
        return self._refusal
