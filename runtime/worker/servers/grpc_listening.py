"""Let a gRPC server listen on an address, in the clear or over TLS."""

from __future__ import annotations

import grpc

from hecompile.runtime.wire.address import TcpAddress
from hecompile.runtime.wire.credentials import ServerCredentials

NOT_SHARED = ("grpc.so_reuseport", 0)
"""Option of a server: a second worker cannot listen on its port, where it would take half of the requests."""


def listen(server: grpc.Server, address: TcpAddress, credentials: ServerCredentials) -> int:
    """Return the port that `server` listens on from now on; with the credentials' certificate where the address wants TLS.

    Raises RuntimeError where it cannot be bound; gRPC does not say why.
    """
    if not address.tls:
        return int(server.add_insecure_port(address.authority))
    authority = credentials.client_authority
    tls = grpc.ssl_server_credentials([(credentials.key, credentials.certificate)], authority, authority is not None)
    return int(server.add_secure_port(address.authority, tls))
