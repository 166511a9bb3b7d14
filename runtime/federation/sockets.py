"""Carry the messages of a federation over TCP on one machine, between a server and owners in processes of their own.

    server → owner   challenge, 32 random bytes
    owner → server   its name and an Ed25519 signature over the challenge
    then frames      8 bytes request number | 8 bytes length | message, both ways; an answer carries the request's number

Loopback only: there is no TLS here. Between machines Flower carries the same messages (docs/federation.md).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from hecompile.errors import FederationError, InputError
from hecompile.foreign import printable
from hecompile.runtime.federation.protocol.channels import Identity, Roster
from hecompile.runtime.federation.protocol.messages import Finished, Message, from_bytes, to_bytes
from hecompile.runtime.federation.protocol.participant import Participant
from hecompile.runtime.wire.framing import receive_exactly, send_exactly

MAX_BYTES = 1 << 30
JOIN_SECONDS = 180.0
"""Time in which all owners must connect."""
_SLOW_SECONDS = 60.0
"""Time that a message may take, from its first byte on, beside what it takes at the slowest rate of `framing`."""
_EXCHANGES = 4
"""Exchanges of a round, in each of which the server waits for the owners that it asks."""
_HELLO = b"hecompile/federation/hello/1"
_HELLO_SECONDS = 10.0
_MOST_STRANGERS = 64
"""Connections at once that have not proved yet whose they are."""
_PREFIX = struct.Struct("<QQ")
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Link:
    """Hold the connection of an owner, and in `answers` what it sent, by request number."""

    connection: socket.socket
    answers: dict[int, bytes] = field(default_factory=dict)
    broken: bool = False


class FederationServer:
    """Listen on a loopback address for owners, and exchange messages with them, as an `Exchange`; a context manager.

    An owner whose connection breaks, or that is silent for `reply_timeout` seconds, is left out of the exchange. One that
    comes back takes part from the next on.
    """

    def __init__(self, roster: Roster, host: str = "127.0.0.1", port: int = 0, reply_timeout: float = 600.0) -> None:
        if host not in ("127.0.0.1", "::1", "localhost"):
            raise InputError(
                f"{host} can be reached from other machines, and these sockets have no TLS: use Flower for that"
            )
        self._roster = roster
        self._reply_timeout = reply_timeout
        self._socket = socket.create_server((host, port))
        self.address = "tcp://{}:{}".format(*self._socket.getsockname()[:2])
        self._links: dict[str, _Link] = {}
        self._changed = threading.Condition()
        self._number = 0
        self._places = threading.BoundedSemaphore(_MOST_STRANGERS)
        self.bytes_received = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> FederationServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        with self._changed:
            for link in self._links.values():
                link.connection.close()

    def wait_for(self, count: int, timeout: float, fewest: int | None = None) -> list[str]:
        """Wait for `count` owners and return the names of all.

        Raises FederationError where not even `fewest` (by default all) have come after `timeout` seconds.
        """
        with self._changed:
            self._changed.wait_for(lambda: len(self._links) >= count, timeout)
            if len(self._links) < (count if fewest is None else fewest):
                raise FederationError(f"{len(self._links)} of {count} owners connected within {timeout:g} s")
            return sorted(self._links)

    def __call__(self, requests: Mapping[str, Message]) -> dict[str, Message]:
        """Send each owner its message and return the replies, as `Exchange` says; `Finished` is not answered."""
        with self._changed:
            self._number += 1
            number = self._number
            links = {name: self._links[name] for name in requests if name in self._links}
        written = {id(message): to_bytes(message) for message in requests.values()}
        for name, link in links.items():
            try:
                _send(link.connection, number, written[id(requests[name])], self._reply_timeout)
            except OSError:  # one that takes nothing, too
                self._drop(name, link)
        if all(isinstance(message, Finished) for message in requests.values()):
            return {}
        answers = self._wait_for_answers(links, number)
        for name in sorted(links.keys() - answers.keys()):
            _log.warning("%s did not answer; the round goes on without it if enough are left", name)
        self.bytes_received += sum(map(len, answers.values()))
        return {name: _answer_of(name, answer) for name, answer in answers.items()}

    def _wait_for_answers(self, links: Mapping[str, _Link], number: int) -> dict[str, bytes]:
        with self._changed:
            self._changed.wait_for(
                lambda: all(number in link.answers or link.broken for link in links.values()), self._reply_timeout
            )
            answers = {name: link.answers.pop(number) for name, link in links.items() if number in link.answers}
            for link in links.values():
                link.answers.clear()
        return answers

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return  # closed
            if not self._places.acquire(blocking=False):
                _log.warning("a connection was refused: %d have not said yet whose they are", _MOST_STRANGERS)
                connection.close()
                continue
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(_HELLO_SECONDS)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            name = self._authenticate(connection)
        except (OSError, FederationError, UnicodeDecodeError) as error:
            _log.warning("a connection was refused: %s", printable(error))
            connection.close()
            return
        finally:
            self._places.release()
        link = self._register(name, connection)
        try:
            while True:
                number, content = _receive(connection)  # its silence is what an exchange bounds
                with self._changed:
                    if number == self._number:  # a late answer to an earlier request is dropped
                        link.answers[number] = content
                    self._changed.notify_all()
        except (OSError, FederationError):
            self._drop(name, link)

    def _register(self, name: str, connection: socket.socket) -> _Link:
        """Put a connection in the place of an earlier one of that owner."""
        link = _Link(connection)
        with self._changed:
            earlier = self._links.get(name)
            self._links[name] = link
            self._changed.notify_all()
        if earlier is not None:
            earlier.connection.close()
        return link

    def _authenticate(self, connection: socket.socket) -> str:
        """Return the name of the owner who proves to be it. Raises FederationError for anybody else."""
        challenge = os.urandom(32)
        send_exactly(connection, challenge, _HELLO_SECONDS)
        _, hello = _receive(connection, _HELLO_SECONDS, limit=1024, patience=_HELLO_SECONDS)
        signature, name = hello[:64], hello[64:].decode()
        try:
            Ed25519PublicKey.from_public_bytes(self._roster[name]).verify(signature, _HELLO + challenge)
        except (KeyError, InvalidSignature):
            raise FederationError("somebody who is not in the roster, or cannot prove it") from None
        return name

    def _drop(self, name: str, link: _Link) -> None:
        with self._changed:
            link.broken = True
            if self._links.get(name) is link:
                del self._links[name]
            self._changed.notify_all()
        link.connection.close()


def _answer_of(name: str, content: bytes) -> Message:
    try:
        return from_bytes(content)
    except FederationError as error:
        raise FederationError(f"{name!r} sent what cannot be read: {error}") from None


def longest_silence(reply_timeout: float = 600.0) -> float:
    """Return the seconds after which an owner gives up a server that says nothing.

    A server that is there waits for all to join, and for up to `reply_timeout` in each exchange; an owner that it leaves out
    of a round hears of the next one after all exchanges of that.
    """
    return JOIN_SECONDS + _EXCHANGES * reply_timeout


def take_part(
    participant: Participant, identity: Identity, address: str, timeout: float = 60.0, silence: float | None = None
) -> Finished:
    """Connect, answer until the federation is over, and return its last message.

    Args:
        participant: what answers.
        identity: whose it is.
        address: of the server.
        timeout: seconds in which the server must answer the connection.
        silence: seconds without a message after which the server is given up; by default `longest_silence`. One that has
            begun must come in a minute, or at the slowest rate of `framing`.

    Raises:
        FederationError: no server answers, it is silent or too slow, or the connection breaks.
    """
    silence = longest_silence() if silence is None else silence
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    try:
        connection = socket.create_connection((host, int(port)), timeout)
    except (OSError, ValueError) as error:
        raise FederationError(f"no federation answers at {address}: {error}") from None
    with contextlib.closing(connection):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            hello = identity.sign_hello(_HELLO + _challenge(connection, address, timeout)) + identity.name.encode()
            _send(connection, 0, hello)
            while True:
                number, content = _receive(connection, silence)
                message = from_bytes(content)
                if isinstance(message, Finished):
                    return message
                _send(connection, number, to_bytes(participant.answer_or_refuse(message)))
        except TimeoutError:
            raise FederationError(
                f"the server of the federation at {address} said nothing for {silence:g} s, or began a message that did not "
                f"come within {_SLOW_SECONDS:g} s; see its log; the same command with --resume goes on"
            ) from None
        except OSError as error:
            raise FederationError(
                f"the connection to the federation at {address} broke: {error}; the same command with --resume goes on"
            ) from None


def _challenge(connection: socket.socket, address: str, timeout: float) -> bytes:
    try:
        return _read(connection, 32, timeout)
    except TimeoutError:
        raise FederationError(f"no federation answers at {address} within {timeout:g} s") from None


def _send(connection: socket.socket, number: int, content: bytes, patience: float | None = None) -> None:
    """Send a message with `patience`, by default _SLOW_SECONDS, as `send_exactly` has it. Raises OSError as that does."""
    patience = _SLOW_SECONDS if patience is None else patience
    send_exactly(connection, _PREFIX.pack(number, len(content)) + content, patience)


def _receive(
    connection: socket.socket, silence: float | None = None, limit: int = MAX_BYTES, patience: float | None = None
) -> tuple[int, bytes]:
    """Wait up to `silence` seconds for a message to begin, and for its bytes with `patience` as `receive_exactly` has it.

    Raises TimeoutError for either, FederationError for a message that is too large, OSError as the socket does.
    """
    patience = _SLOW_SECONDS if patience is None else patience
    connection.settimeout(silence)
    first = connection.recv(1)
    if not first:
        raise ConnectionError("the other side closed it")
    number, size = _PREFIX.unpack(first + _read(connection, _PREFIX.size - 1, patience))
    if size > limit:
        raise FederationError(f"a message of {size} bytes is announced; at most {limit} are read")
    return number, _read(connection, size, patience)


def _read(connection: socket.socket, size: int, patience: float) -> bytes:
    try:
        return bytes(receive_exactly(connection, size, patience))
    except EOFError:
        raise ConnectionError("the other side closed it") from None
