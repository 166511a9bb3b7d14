"""Open a gRPC channel to a worker, in the clear or over TLS."""

from __future__ import annotations

from collections.abc import Iterable

import grpc

from hecompile.runtime.wire.address import TcpAddress
from hecompile.runtime.wire.credentials import ClientCredentials

Options = Iterable[tuple[str, int]]


def open_channel(address: TcpAddress, credentials: ClientCredentials, options: Options) -> grpc.Channel:
    """Return a channel with a connection of its own, which is made at the first call and ends with the channel."""
    options = [*options, ("grpc.use_local_subchannel_pool", 1)]
    if address.is_loopback:
        options.append(("grpc.enable_http_proxy", 0))  # nothing meant for this machine goes to another
    if not address.tls:
        return grpc.insecure_channel(address.authority, options)
    tls = grpc.ssl_channel_credentials(credentials.authority, credentials.key, credentials.certificate)
    return grpc.secure_channel(address.authority, tls, options)
