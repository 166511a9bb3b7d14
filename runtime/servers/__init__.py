"""Servers of the worker, one per protocol; that of frames on plain sockets is `runtime.worker.WorkerServer`."""

from __future__ import annotations

from typing import Protocol

from hecompile.errors import InputError
from runtime import protocol
from runtime.transports.address import TcpAddress, parse_address
from runtime.transports.credentials import ServerCredentials
from runtime.worker import Worker, WorkerServer


class Server(Protocol):
    """A worker at an address; a context manager that stops it at its end."""

    @property
    def address(self) -> str:
        """The address that clients connect to, with the real port."""
        ...

    def __enter__(self) -> Server: ...

    def __exit__(self, *_: object) -> None: ...


def open_server(
    worker: Worker,
    address: str,
    *,
    allow_plaintext_network: bool = False,
    max_message_bytes: int = protocol.MAX_MESSAGE_BYTES,
    credentials: ServerCredentials | None = None,
) -> Server:
    """The server for the scheme of `address`. Raises InputError as it does, and for credentials that it has no use for."""
    parsed = parse_address(address)
    if isinstance(parsed, TcpAddress) and parsed.scheme in ("flight", "flights"):
        from runtime.servers.flight import FlightWorkerServer

        return FlightWorkerServer(
            worker,
            address,
            allow_plaintext_network=allow_plaintext_network,
            max_message_bytes=max_message_bytes,
            credentials=credentials,
        )
    if isinstance(parsed, TcpAddress) and parsed.scheme != "tcp":
        raise InputError(f"{address}: {parsed.scheme}:// is not served")
    if credentials is not None and (credentials.tls or credentials.authenticates):
        raise InputError(f"{address} carries neither TLS nor tokens; use flights://")
    return WorkerServer(
        worker, address, allow_plaintext_network=allow_plaintext_network, max_message_bytes=max_message_bytes
    )
