"""Serve frames over TCP and Unix sockets."""

from __future__ import annotations

import threading
from pathlib import Path

from hecompile.errors import InputError
from hecompile.files import reason_of
from hecompile.runtime.wire import framing
from hecompile.runtime.wire.address import TcpAddress, UnixAddress, parse_address
from hecompile.runtime.wire.connections import handler_class, server_class
from hecompile.runtime.worker.worker import Worker


class WorkerServer:
    """Serve one worker on a socket, each client in a thread of its own.

    An address that other machines can reach is refused unless `allow_plaintext_network`. Ciphertexts are safe to show, but
    the connection has no authentication, and whoever changes replies stops the training.

    Args:
        worker: answers the requests.
        address: `tcp://host:port` (port 0: any free one) or `unix:///path`.
        allow_plaintext_network: whether other machines may reach it.
        max_message_bytes: largest frame that is accepted.

    Raises:
        InputError: the address cannot be served.
    """

    def __init__(
        self,
        worker: Worker,
        address: str,
        *,
        allow_plaintext_network: bool = False,
        max_message_bytes: int = framing.MAX_MESSAGE_BYTES,
    ) -> None:
        parsed = parse_address(address)
        if isinstance(parsed, TcpAddress) and parsed.scheme != "tcp":
            raise InputError(f"{address} is not an address of this server; use `open_server`")
        if isinstance(parsed, TcpAddress) and not parsed.is_loopback and not allow_plaintext_network:
            raise InputError(
                f"{address} can be reached from other machines without authentication; listen on 127.0.0.1 and forward "
                "the port over SSH, or pass --allow-plaintext-network (in a fleet's file: allow_plaintext_network: true)"
            )
        self._unix_path = Path(parsed.path) if isinstance(parsed, UnixAddress) else None
        kind = server_class(parsed)
        try:
            self._server = kind(parsed.socket_address, handler_class(worker.exchange, max_message_bytes))
        except OSError as error:
            raise InputError(
                f"cannot listen on {address}: {reason_of(error)}; free the address or choose another"
            ) from error
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1})

    @property
    def address(self) -> str:
        """Return the address that clients connect to, with the real port."""
        if self._unix_path is not None:
            return f"unix://{self._unix_path}"
        host, port = self._server.socket.getsockname()[:2]
        return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"

    def __enter__(self) -> WorkerServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop accepting, let requests under way be answered, end the connections."""
        self._server.shutdown()
        self._thread.join()
        self._server.end_connections()
        self._server.server_close()  # waits for the connections' threads
        if self._unix_path is not None:
            self._unix_path.unlink(missing_ok=True)
