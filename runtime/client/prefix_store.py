"""Keep bytes for each example within a budget: in memory, or in a file encrypted under a key that is in memory alone.

A file has no name: it is gone with the process, however that ends, and a key of one store opens nothing of another. Each
record is one message of AES-256-GCM (NIST SP 800-38D) under a nonce of its own, bound to its example and its text. Nonces
are counted, so that a forked process, whose count would go on from the same number, keeps nothing.
"""

from __future__ import annotations

import itertools
import logging
import os
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from hecompile.errors import InputError
from hecompile.files import reason_of

_LOG = logging.getLogger(__name__)
_KEY_BITS, _NONCE_BYTES, _TAG_BYTES = 256, 12, 16


@dataclass(frozen=True)
class _Record:
    """Say of which text a record is, and where: its bytes, or nonce, offset and size in the file."""

    digest: bytes
    content: bytes
    nonce: bytes = b""
    offset: int = 0
    size: int = 0


class PrefixStore:
    """Keep one record for each number; several threads may use it at once.

    Args:
        budget: bytes in all. A record that does not fit is not kept, and the log says so once.
        directory: where the file is; None for memory.

    Raises:
        InputError: there can be no file in the directory.
    """

    def __init__(self, budget: int, directory: Path | None = None) -> None:
        self._budget, self._used = budget, 0
        self._records: dict[int, _Record] = {}
        self._full = False
        self._lock = threading.Lock()
        self._cipher = AESGCM(AESGCM.generate_key(_KEY_BITS))
        self._nonces = itertools.count()
        self._process = os.getpid()
        self._file: IO[bytes] | None = None
        if directory is not None:
            try:
                self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115  for as long as the store
            except OSError as error:
                reason = reason_of(error)
                raise InputError(f"prefix_cache.directory {directory} cannot be used: {reason}; name another") from None

    def __len__(self) -> int:
        return len(self._records)

    def get(self, number: int, digest: bytes) -> bytes | None:
        """Return the record of an example, None where there is none.

        A record of another text than that with `digest`, or one that was damaged on the disk, is dropped; the log says so.
        """
        with self._lock:
            record = self._records.get(number)
        if record is None:
            return None
        if record.digest != digest:
            self._drop(number, "it is of another text")
            return None
        if self._file is None:
            return record.content
        try:
            sealed = os.pread(self._file.fileno(), record.size, record.offset)
            return self._cipher.decrypt(record.nonce, sealed, _bound(number, digest))
        except (OSError, InvalidTag) as error:
            self._drop(number, reason_of(error) if isinstance(error, OSError) else "the file was changed or damaged")
            return None

    def put(self, number: int, digest: bytes, content: bytes) -> None:
        """Keep a record unless the budget or the disk has no room for it, or this process is a fork of the store's."""
        if os.getpid() != self._process:
            return  # both would encrypt under the same nonces, and write to the same places of one file
        size = len(content) + (0 if self._file is None else _TAG_BYTES)
        with self._lock:
            if self._full or number in self._records:
                return
            if self._used + size > self._budget:
                self._stop(f"its {self._budget:,} bytes are full")
                return
            offset, self._used = self._used, self._used + size
            nonce = next(self._nonces).to_bytes(_NONCE_BYTES, "big")
        record = _Record(digest, content)
        if self._file is not None:
            record = _Record(digest, b"", nonce, offset, size)
            try:
                self._write(self._cipher.encrypt(nonce, content, _bound(number, digest)), offset)
            except OSError as error:
                with self._lock:
                    self._stop(reason_of(error))
                return
        with self._lock:
            self._records[number] = record

    def close(self) -> None:
        """Forget everything; a file's room is free again."""
        with self._lock:
            self._records.clear()
            self._full = True
            if self._file is not None:
                self._file.close()

    def _write(self, sealed: bytes, offset: int) -> None:
        assert self._file is not None
        view = memoryview(sealed)
        while view:
            written = os.pwrite(self._file.fileno(), view, offset)
            view, offset = view[written:], offset + written

    def _stop(self, reason: str) -> None:
        """Keep no more records, and say so once. What is kept stays in use."""
        if not self._full:
            _LOG.warning(
                "prefix_cache: %s. %d examples are kept; the lower layers of all others are computed again in every epoch",
                reason, len(self._records),
            )  # fmt: skip
        self._full = True

    def _drop(self, number: int, reason: str) -> None:
        with self._lock:
            self._records.pop(number, None)
        _LOG.warning("prefix_cache: what was kept of an example is dropped, and computed again: %s", reason)


def _bound(number: int, digest: bytes) -> bytes:
    return number.to_bytes(8, "big") + digest
