"""Where a worker listens: `tcp://host:port`, `tcp://[ipv6]:port` or `unix:///path`."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from hecompile.errors import InputError


@dataclass(frozen=True)
class TcpAddress:
    """A host name or IP address without brackets, and a port (0 when listening: any free one)."""

    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it; a host name other than `localhost` counts as no."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def socket_address(self) -> tuple[str, int]:
        """What `socket.bind` and `connect` take."""
        return self.host, self.port


@dataclass(frozen=True)
class UnixAddress:
    """The path of a Unix domain socket."""

    path: str

    @property
    def socket_address(self) -> str:
        """What `socket.bind` and `connect` take."""
        return self.path


def parse_address(address: str) -> TcpAddress | UnixAddress:
    """Raises InputError when `address` is of neither form."""
    wanted = "needs tcp://host:port or unix:///path"
    try:
        parts = urlsplit(address)
        port = parts.port  # ValueError when out of range or no number
    except ValueError as error:
        raise InputError(f"worker address {address!r}: {error}; {wanted}") from error
    if parts.scheme == "unix" and not parts.netloc and parts.path.startswith("/"):
        return UnixAddress(parts.path)
    if parts.scheme == "tcp" and parts.hostname and port is not None and not parts.path:
        return TcpAddress(parts.hostname, port)
    raise InputError(f"worker address {address!r} is not understood; {wanted}")
