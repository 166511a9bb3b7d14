"""Keep check vectors on disk, readable by their owner alone and secret from the worker, and know which are spent.

`verification` says what they are for, and why vectors that have caught a lie must not check another reply: a lie tells
something about them by being caught, and the bounds hold until then. The client may have no weights to draw others with. So
a circuit has SERIES independent sets, and all circuits use the set of the same number at a time. A lie that is caught spends
it: all that is verified from then on, whoever computed it, is verified with the next. A bundle whose sets are spent is
refused. So a sum of a window that is visibly wrong ever passes with probability SERIES · MISSED < 2^-21 at most.

<circuit>.npy   uint8 [series, variants, ...], see `Checks.pack`; int32 [variants, ...] in old bundles, which have one set
spent.<k>       set k is spent. It is on disk before anybody learns of the lie, and is never removed

All that use one folder, in any process, see its marks. A copy, or a backup put back, does not know what was caught with the
other: use one folder for one bundle.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hecompile.array_files import map_npy
from hecompile.errors import InputError, VerificationError
from hecompile.files import opened_whole, reason_of, unreadable
from hecompile.he.check_vectors import Checks
from hecompile.he.parameters import LinearParameters

SERIES = 3
"""Sets of vectors of a circuit."""

_LOG = logging.getLogger(__name__)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_SPENT = "spent."


def _synced(path: Path, flags: int) -> None:
    """Open a file or folder, make it durable and close it. Raises OSError as files do."""
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _path(directory: Path, circuit: str) -> Path:
    if not _NAME.fullmatch(circuit):
        raise InputError(f"{circuit!r} cannot name a circuit: use letters, digits, dots, dashes and underscores")
    return directory / f"{circuit}.npy"


def write_checks(directory: Path, circuit: str, *series: Checks) -> Path:
    """Write sets of vectors to `<directory>/<circuit>.npy` with mode 0600, whole or not at all, and return the path.

    Raises:
        InputError: `circuit` cannot be the name of a file.
        OSError: the file cannot be written.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = _path(directory, circuit)
    with opened_whole(path, mode=0o600) as file:
        np.save(file, np.stack([checks.pack() for checks in series]))
    return path


class CheckStore:
    """Serve the check vectors of a folder that are not spent. Safe to use from several threads and processes.

    Those of a circuit are read at their first use and kept.

    Raises:
        InputError: the folder cannot be written to, so that nothing could be marked as spent, or all vectors are.
    """

    def __init__(self, directory: Path, circuits: Iterable[str] = ()) -> None:
        self._directory = directory
        self._checks: dict[str, Checks] = {}
        self._caught: set[int] = set()  # spent here, whether or not that could be written
        self._lock = threading.Lock()
        arrays = [self._array(circuit) for circuit in circuits]
        self._series = min((len(array) if array.ndim == 3 else 1 for array in arrays), default=SERIES)
        if any(array.ndim == 2 for array in arrays):
            _LOG.warning(
                "%s has check vectors of an earlier version: a worker can change one output in 256 by half the modulus "
                "unseen, and the first lie that is caught ends the bundle: export again", directory,
            )  # fmt: skip
        if not os.access(directory, os.W_OK):
            raise InputError(
                f"{directory} is not writable: what a cheating worker was caught with must be recorded in it"
            )
        if self.left == 0:
            raise InputError(self._used_up())

    @property
    def left(self) -> int:
        """Return how many sets of vectors are not spent."""
        return self._series - self._current()

    def checks(self, circuit: str, linear: LinearParameters) -> Checks:
        """Return the check vectors of that circuit that are in use now.

        Raises:
            InputError: the file is missing, damaged or of another circuit.
            VerificationError: all vectors are spent.
        """
        with self._lock:
            series = self._current()
            if series >= self._series:
                raise VerificationError(self._used_up())
            checks = self._checks.get(circuit)
            if checks is None or checks.series != series:
                checks = self._checks[circuit] = self._read(circuit, linear, series)
            return checks

    def spend(self, series: int) -> None:
        """Record that a lie was caught by set `series`, for good, before returning.

        Raises:
            VerificationError: it cannot be recorded.
        """
        self._caught.add(series)
        path = self._directory / f"{_SPENT}{series}"
        try:
            _synced(path, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW)
            _synced(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise VerificationError(
                f"a worker was caught, and {path} cannot be written ({reason_of(error)}): export again before going on"
            ) from error

    def _current(self) -> int:
        """Return which set is in use: the first without a mark, which any process may have made a moment ago."""
        series = 0
        while series < self._series and (series in self._caught or self._is_spent(series)):
            series += 1
        return series

    def _is_spent(self, series: int) -> bool:
        """Return whether the mark is there, whatever kind of file it is.

        Raises:
            VerificationError: that is not known.
        """
        path = self._directory / f"{_SPENT}{series}"
        try:
            path.lstat()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise VerificationError(f"whether check vectors are spent is unknown: {path}: {reason_of(error)}") from error
        return True

    def _used_up(self) -> str:
        return (
            f"all {self._series} set(s) of check vectors in {self._directory} are spent, each on a worker that was caught "
            "with a wrong reply: export again, which draws new ones"
        )

    def _array(self, circuit: str) -> NDArray[Any]:
        """Map the file of a circuit. Raises InputError when it cannot be read."""
        path = _path(self._directory, circuit)
        try:
            return map_npy(path)
        except (OSError, ValueError) as error:
            raise unreadable(f"the check vectors {path}", error, "export again") from error

    def _read(self, circuit: str, linear: LinearParameters, series: int) -> Checks:
        stored = self._array(circuit)
        packed = stored if stored.ndim == 3 else stored[None]
        if series >= len(packed):
            raise InputError(f"{_path(self._directory, circuit)} has no check vectors of set {series}: export again")
        return Checks.unpack(np.array(packed[series]), linear, series)
