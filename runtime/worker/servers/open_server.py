"""Open the server for an address, by its scheme. Every server hands requests to `hecompile.runtime.worker.worker.handle`."""

from __future__ import annotations

from typing import Protocol

from hecompile.errors import InputError
from hecompile.runtime.wire import framing
from hecompile.runtime.wire.address import TcpAddress, parse_address
from hecompile.runtime.wire.credentials import ServerCredentials
from hecompile.runtime.wire.network import FLIGHT_SCHEMES, OIP_SCHEMES, load_network_module
from hecompile.runtime.worker.servers.sockets import WorkerServer
from hecompile.runtime.worker.worker import Worker


class Server(Protocol):
    """Serve while entered as a context manager; on leaving it, requests under way are still answered."""

    @property
    def address(self) -> str:
        """Return the address that clients connect to, with the real port."""
        ...

    def __enter__(self) -> Server: ...

    def __exit__(self, *_: object) -> None: ...


def open_server(
    worker: Worker,
    address: str,
    *,
    credentials: ServerCredentials | None = None,
    allow_plaintext_network: bool = False,
    max_message_bytes: int = framing.MAX_MESSAGE_BYTES,
) -> Server:
    """Return a server of `worker` that listens on `address`. Raises InputError for an address that cannot be served."""
    parsed = parse_address(address)
    scheme = parsed.scheme if isinstance(parsed, TcpAddress) else "unix"
    credentials = credentials or ServerCredentials()
    if scheme in OIP_SCHEMES:
        server: Server = load_network_module("hecompile.runtime.worker.servers.oip").OipServer(
            worker,
            parsed,
            credentials=credentials,
            allow_plaintext_network=allow_plaintext_network,
            max_message_bytes=max_message_bytes,
        )
        return server
    if scheme in FLIGHT_SCHEMES:
        flight: Server = load_network_module("hecompile.runtime.worker.servers.flight").FlightWorkerServer(
            worker,
            address,
            allow_plaintext_network=allow_plaintext_network,
            max_message_bytes=max_message_bytes,
            credentials=credentials,
        )
        return flight
    if credentials.tls or credentials.authenticates:
        raise InputError(
            f"{scheme}:// has neither TLS nor tokens; listen on grpcs:// or flights://, or drop the credentials"
        )
    return WorkerServer(
        worker, address, allow_plaintext_network=allow_plaintext_network, max_message_bytes=max_message_bytes
    )
