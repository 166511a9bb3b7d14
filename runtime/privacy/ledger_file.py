"""Keep the lines of a privacy ledger in an append-only file, each tied to the line before it.

A line is on disk (fsync) when `append` returns. It ends in the SHA-256 of the line before it and itself: a line that was
changed, left out or moved is found when the file is read. A last line without its end was being written when the power
went; it is dropped. One process at a time has the file (flock).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hecompile.errors import InputError, PrivacyError
from hecompile.files import reason_of


class LedgerFile:
    """Hold an open, locked file of chained records. Read `records` to the end before appending.

    Raises InputError where it cannot be opened, PrivacyError where another process has it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _open_locked(path)
        self._length, self._chain = 0, ""

    def records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield each record with the number of its line, from 1. Raises PrivacyError at the first that is damaged."""
        size = os.fstat(self._file).st_size
        whole = os.pread(self._file, size, 0)
        complete = whole[: whole.rfind(b"\n") + 1]
        if len(complete) < size:  # being written when the machine stopped: its release was not made
            os.ftruncate(self._file, len(complete))
        self._length, self._chain = len(complete), ""
        for number, line in enumerate(complete.splitlines(), start=1):
            yield number, self._parse(line, number)

    def append(self, record: dict[str, Any]) -> None:
        """Write a record; it is on disk when this returns. Raises InputError, and closes the file, where it cannot be."""
        chain = _link(self._chain, record)
        line = json.dumps(record | {"chain": chain}).encode() + b"\n"
        try:
            written = os.write(self._file, line)
            os.fsync(self._file)
            if written != len(line):
                raise OSError(0, f"{written} of {len(line)} bytes were written")
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._length)
            self.close()
            raise InputError(
                f"cannot write the privacy ledger {self.path}: {reason_of(error)}; nothing was released"
            ) from error
        self._length, self._chain = self._length + len(line), chain

    def sync_name(self) -> None:
        """Put the name of a new file on disk too."""
        descriptor = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def damaged(self, number: int) -> PrivacyError:
        """Make the error for line `number`."""
        return PrivacyError(
            f"the privacy ledger {self.path} is damaged at line {number}: what was spent cannot be known from it. Put back "
            f"a copy (each checkpoint has one) that holds all releases; do not go on with less"
        )

    def close(self) -> None:
        """Close the file, which lets another process have it."""
        with contextlib.suppress(OSError):
            os.close(self._file)
        self._file = -1

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            record = dict(json.loads(line))
            chain = record.pop("chain")
        except (ValueError, TypeError, KeyError, RecursionError):
            raise self.damaged(number) from None
        if chain != _link(self._chain, record):
            raise self.damaged(number)
        self._chain = str(chain)
        return record


def chained(records: Iterable[dict[str, Any]]) -> bytes:
    """Return the lines of a file that holds `records`, each with its chain."""
    lines, chain = [], ""
    for record in records:
        chain = _link(chain, record)
        lines.append(json.dumps(record | {"chain": chain}).encode() + b"\n")
    return b"".join(lines)


def _link(before: str, record: dict[str, Any]) -> str:
    return hashlib.sha256(f"{before}\n{json.dumps(record, sort_keys=True)}".encode()).hexdigest()


def _open_locked(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InputError(f"cannot open the privacy ledger {path}: {reason_of(error)}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise PrivacyError(
            f"the privacy ledger {path} is in use by another run; two at once would each spend what the other has"
        ) from None
    return file
