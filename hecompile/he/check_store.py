"""Keep check vectors on disk: one file per circuit, readable by its owner alone, secret from the worker.

`verification` says what they are for.
"""

from __future__ import annotations

import re
import threading
from pathlib import Path

import numpy as np

from hecompile.array_files import read_npy
from hecompile.errors import InputError
from hecompile.files import opened_whole, unreadable
from hecompile.he.check_vectors import Checks
from hecompile.he.parameters import LinearParameters

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")


def _path(directory: Path, circuit: str) -> Path:
    if not _NAME.fullmatch(circuit):
        raise InputError(f"{circuit!r} cannot name a circuit: use letters, digits, dots, dashes and underscores")
    return directory / f"{circuit}.npy"


def write_checks(directory: Path, circuit: str, checks: Checks) -> Path:
    """Write `<directory>/<circuit>.npy` with mode 0600, whole or not at all, and return the path.

    Raises:
        InputError: `circuit` cannot be the name of a file.
        OSError: the file cannot be written.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = _path(directory, circuit)
    with opened_whole(path, mode=0o600) as file:
        np.save(file, checks.pack())
    return path


class CheckStore:
    """Serve the check vectors of a folder, each read at its first use and kept. Safe to use from several threads."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._checks: dict[str, Checks] = {}
        self._lock = threading.Lock()

    def checks(self, circuit: str, linear: LinearParameters) -> Checks:
        """Return the check vectors of that circuit.

        Raises:
            InputError: the file is missing, damaged or of another circuit.
        """
        with self._lock:
            if circuit not in self._checks:
                path = _path(self._directory, circuit)
                try:
                    packed = read_npy(path)
                except (OSError, ValueError) as error:
                    raise unreadable(f"the check vectors {path}", error, "export again") from error
                self._checks[circuit] = Checks.unpack(packed, linear)
            return self._checks[circuit]
