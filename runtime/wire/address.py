"""Parse the addresses of workers; the scheme names the protocol.

    tcp://host:port, unix:///path        frames of `hecompile.runtime.wire.framing`, for processes of one machine
    grpc://host:port, grpcs://...        Open Inference Protocol v2 over gRPC, in the clear or over TLS
    flight://host:port, flights://...    Arrow Flight, in the clear or over TLS

An IPv6 address stands in brackets.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from hecompile.errors import InputError

TLS_SCHEMES = ("grpcs", "flights")
SCHEMES = ("tcp", "grpc", "flight", *TLS_SCHEMES)
DIRECTORY_SCHEMES = ("http://", "https://")
"""How the address of a fleet's directory begins (`hecompile.runtime.transports.directory`)."""


@dataclass(frozen=True)
class TcpAddress:
    """Hold a host name or IP address without brackets, a port (0 when listening: any free one), and the scheme."""

    host: str
    port: int
    scheme: str = "tcp"

    @property
    def tls(self) -> bool:
        """Tell whether the connection is encrypted and the worker shows a certificate."""
        return self.scheme in TLS_SCHEMES

    @property
    def authority(self) -> str:
        """Return host:port as in a URL."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Tell whether only this machine can reach it; of host names, `localhost` alone counts as such."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def socket_address(self) -> tuple[str, int]:
        """Return the address as `socket.bind` and `connect` take it."""
        return self.host, self.port


@dataclass(frozen=True)
class UnixAddress:
    """Hold the path of a Unix domain socket."""

    path: str

    @property
    def socket_address(self) -> str:
        """Return the address as `socket.bind` and `connect` take it."""
        return self.path


def parse_address(address: str) -> TcpAddress | UnixAddress:
    """Parse the address of a worker. Raises InputError when it has none of the forms above."""
    wanted = "needs tcp://, grpc://, grpcs://, flight:// or flights://host:port, or unix:///path"
    try:
        parts = urlsplit(address)
        port = parts.port  # ValueError when out of range or no number
    except ValueError as error:
        raise InputError(f"worker address {address!r}: {error}; {wanted}") from error
    if parts.scheme == "unix" and not parts.netloc and parts.path.startswith("/"):
        return UnixAddress(parts.path)
    if parts.scheme in SCHEMES and parts.hostname and port is not None and not parts.path:
        return TcpAddress(parts.hostname, port, parts.scheme)
    raise InputError(f"worker address {address!r} is not understood; {wanted}")
