"""Keep small private files, in memory or in a directory: whole, durable, and one handler at a time."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Protocol

from hecompile.errors import FederationError
from hecompile.files import write_whole
from hecompile.he.random.sampling import Unsharable

_LOCK = "lock"


class Store(Protocol):
    """Hold contents by name. `write` and `remove` are durable when they return."""

    def locked(self) -> AbstractContextManager[None]:
        """Keep every other handler out until the block ends."""

    def place(self, name: str) -> str:
        """Return where a content is, for people."""

    def read(self, name: str) -> bytes | None:
        """Return a content, or None."""

    def write(self, name: str, content: bytes) -> None:
        """Put a content in the place of an earlier one, all of it or nothing."""

    def remove(self, name: str) -> None:
        """Remove a content, if it is there."""

    def clear(self, pattern: str) -> None:
        """Remove all contents whose names match, as file names do."""


class MemoryStore(Unsharable):
    """Hold contents in memory: a `Store` as long as the process lives."""

    __slots__ = ("_contents", "_lock")

    def __init__(self) -> None:
        self._contents: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def locked(self) -> AbstractContextManager[None]:
        return _holding(self._lock)

    def place(self, name: str) -> str:
        return f"{name} in memory"

    def read(self, name: str) -> bytes | None:
        return self._contents.get(name)

    def write(self, name: str, content: bytes) -> None:
        self._contents[name] = content

    def remove(self, name: str) -> None:
        self._contents.pop(name, None)

    def clear(self, pattern: str) -> None:
        for name in [name for name in self._contents if fnmatch(name, pattern)]:
            del self._contents[name]


class DirectoryStore(Unsharable):
    """Hold contents as files that the user alone may read: a `Store` that survives the process.

    The directory is made by the first `locked`. Processes exclude each other by flock.
    """

    __slots__ = ("_directory",)

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @contextmanager
    def locked(self) -> Iterator[None]:
        try:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = os.open(self._directory / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise FederationError(
                f"{self._directory} cannot be used: {error.strerror}", public="its private folder cannot be used"
            ) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def place(self, name: str) -> str:
        return str(self._directory / name)

    def read(self, name: str) -> bytes | None:
        try:
            return (self._directory / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        write_whole(self._directory / name, content, 0o600)
        self._sync()

    def remove(self, name: str) -> None:
        (self._directory / name).unlink(missing_ok=True)
        self._sync()

    def clear(self, pattern: str) -> None:
        for path in self._directory.glob(pattern):
            path.unlink(missing_ok=True)
        self._sync()

    def _sync(self) -> None:
        """Write the directory itself to disk: a file is there after a loss of power only once its name is."""
        directory = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


@contextmanager
def _holding(lock: threading.Lock) -> Iterator[None]:
    with lock:
        yield
