"""Keep a participant's secret between two messages of a round: its X25519 key, for one contribution and one opening.

The key of the encryption itself is not here: it is drawn, used and dropped within one handler (`participant.py`). The key
kept here can only unseal shares of *others'* keys that are addressed to this participant. Taking it deletes it. Shares are
therefore revealed for one set of contributors per round and no other: two sums over sets that differ by one owner would give
that owner's update as their difference.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from hecompile.errors import FederationError, InputError
from hecompile.files import create_private, write_whole
from hecompile.he.random.sampling import Unsharable


class RoundKeys(Protocol):
    """Hold one key per round number; round numbers only grow."""

    def begin(self, number: int) -> X25519PrivateKey:
        """Draw a fresh key for round `number` and forget an unfinished round. Raises FederationError for an old number."""

    def contribute(self, number: int) -> X25519PrivateKey:
        """Return the key for the one contribution of the round. Raises FederationError at the second."""

    def take(self, number: int) -> X25519PrivateKey:
        """Return the key for the one opening of the round, and forget it. Raises FederationError at the second."""


class MemoryKeys(Unsharable):
    """Hold keys in memory, for a participant that lives as long as the federation."""

    __slots__ = ("_contributed", "_key", "_lock", "_number")

    def __init__(self) -> None:
        self._number, self._contributed = 0, False
        self._key: X25519PrivateKey | None = None
        self._lock = threading.Lock()

    def begin(self, number: int) -> X25519PrivateKey:
        """Draw a fresh key, as `RoundKeys` says."""
        with self._lock:
            if number <= self._number:
                raise _old(number, self._number)
            self._number, self._contributed, self._key = number, False, X25519PrivateKey.generate()
            return self._key

    def contribute(self, number: int) -> X25519PrivateKey:
        """Return the key for the contribution, as `RoundKeys` says."""
        with self._lock:
            if number != self._number or self._contributed or self._key is None:
                raise _spent(number, "contributed to")
            self._contributed = True
            return self._key

    def take(self, number: int) -> X25519PrivateKey:
        """Return the key for the opening, as `RoundKeys` says."""
        with self._lock:
            key, self._key = self._key if number == self._number else None, None
        if key is None:
            raise _spent(number, "opened")
        return key


class DirectoryKeys(Unsharable):
    """Hold keys in a private directory, for a participant whose every message is handled by a new process.

    `round-N.key` is there from the invitation to the opening, `round-N.contributed` marks the contribution, and
    `last-round` has the number. Each right is a file that is created or unlinked exactly once, whatever crashes.
    """

    __slots__ = ("_directory",)

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    def begin(self, number: int) -> X25519PrivateKey:
        """Draw a fresh key, as `RoundKeys` says."""
        last = self._last()
        if number <= last:
            raise _old(number, last)
        for stale in (*self._directory.glob("round-*.key"), *self._directory.glob("round-*.contributed")):
            stale.unlink(missing_ok=True)
        write_whole(self._directory / "last-round", f"{number}\n".encode())
        key = X25519PrivateKey.generate()
        create_private(self._path(number), key.private_bytes_raw())
        return key

    def contribute(self, number: int) -> X25519PrivateKey:
        """Return the key for the contribution, as `RoundKeys` says."""
        try:
            content = self._path(number).read_bytes()
            create_private(self._directory / f"round-{number}.contributed", b"")
        except (FileNotFoundError, FileExistsError):
            raise _spent(number, "contributed to") from None
        return X25519PrivateKey.from_private_bytes(content)

    def take(self, number: int) -> X25519PrivateKey:
        """Return the key for the opening, as `RoundKeys` says."""
        taken = self._directory / f"round-{number}.taken"
        try:
            self._path(number).rename(taken)  # one of two callers wins
            content = taken.read_bytes()
            taken.unlink()
        except FileNotFoundError:
            raise _spent(number, "opened") from None
        return X25519PrivateKey.from_private_bytes(content)

    def _path(self, number: int) -> Path:
        return self._directory / f"round-{number}.key"

    def _last(self) -> int:
        path = self._directory / "last-round"
        try:
            return int(path.read_text(encoding="ascii")) if path.exists() else 0
        except ValueError:
            raise InputError(f"{path} is damaged: it holds the number of the last round; restore it") from None


def _old(number: int, last: int) -> FederationError:
    return FederationError(
        f"round {number} was requested after round {last}: round numbers only grow, a repeated one is refused"
    )


def _spent(number: int, what: str) -> FederationError:
    return FederationError(f"round {number} was {what} before, or never begun: a participant does so once per round")
