"""What a data owner has released about a dataset, on disk: it makes a privacy budget hold across runs and crashes.

    {"format": ..., "dataset": sha-256 of the file, "examples": N, "delta": δ, "chain": ...}       the first line
    {"noise_multiplier": z, "sampling_rate": q, "count": n, "note": ..., "chain": ...}             one per release

One file per dataset, append-only. A release is entered, and on disk (fsync), before the noisy value leaves the function
that made it; so a crash can at worst leave a release entered that never happened, never one that happened and is
not entered. Each line ends in the SHA-256 of the line before it and itself: a line that was changed, left out or moved is
found when the file is opened. A last line without its end is one that was being written when the power went: nothing was
released for it, and it is dropped. One process at a time has the file (flock).

It guards an owner against mistakes, not against himself: who deletes the file, or cuts off whole lines at its end, has fewer
releases on record than there were. A checkpoint holds a copy, and a run that goes on from one asks for all that it has.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from hecompile.errors import InputError, PrivacyError
from hecompile.files import file_sha256, reason_of, write_whole
from hecompile.runtime.privacy.accountant import (
    History,
    Mechanism,
    affordable,
    check_delta,
    check_epsilon,
    spent_epsilon,
)

FORMAT = "hecompile privacy ledger 1"
_LOOK_AHEAD = 64
"""Releases whose fitting into the budget is found out at a time: each asking takes some tenths of a second."""


@dataclass(frozen=True)
class Subject:
    """What a promise is about: the dataset by the SHA-256 of its file (hex), its number of examples, and δ."""

    dataset: str
    examples: int
    delta: float

    @staticmethod
    def of_file(path: str | Path, examples: int, delta: float) -> Subject:
        """The subject of the file at `path`, which holds `examples`. Raises InputError for a δ that promises nothing."""
        check_delta(delta, examples)
        try:
            digest = file_sha256(Path(path))
        except OSError as error:
            raise InputError(f"cannot read the dataset {path}: {reason_of(error)}") from None
        return Subject(digest, examples, delta)

    @staticmethod
    def of_ledger(path: str | Path) -> Subject:
        """What the ledger at `path` is about. Raises InputError where there is none, PrivacyError where it is not one."""
        try:
            with Path(path).open("rb") as file:
                header = json.loads(file.readline())
            return Subject(str(header["dataset"]), int(header["examples"]), float(header["delta"]))
        except OSError as error:
            raise InputError(f"cannot read the privacy ledger {path}: {reason_of(error)}") from None
        except (ValueError, TypeError, KeyError):
            raise PrivacyError(f"{path} is not a privacy ledger, or its first line is damaged") from None


class PrivacyLedger:
    """An open ledger. `spend` before every release; `close` at the end, or use it in a `with`.

    Args:
        path: the file; made, with its folder, where there is none.
        subject: what the promise is about; a file about anything else is refused.
        epsilon: the budget that `spend` keeps to, everything in the file included; None keeps a record without a limit.

    Raises:
        PrivacyError: the file is damaged, about another dataset or δ, or open in another process.
        InputError: it cannot be read or written, or epsilon is not a positive number.
    """

    def __init__(self, path: str | Path, subject: Subject, epsilon: float | None = None) -> None:
        if epsilon is not None:
            check_epsilon(epsilon)
        check_delta(subject.delta, subject.examples)
        self.path, self.subject, self.epsilon = Path(path), subject, epsilon
        self._counts: Counter[Mechanism] = Counter()
        self._last: Mechanism | None = None
        self._affordable: tuple[Mechanism, int] | None = None
        self._file = _open_locked(self.path)
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    @property
    def history(self) -> History:
        """All releases on record, each mechanism with how often."""
        return list(self._counts.items())

    @property
    def last(self) -> Mechanism | None:
        """The latest release."""
        return self._last

    @property
    def releases(self) -> int:
        """How many are on record."""
        return sum(self._counts.values())

    def spent(self) -> float:
        """ε of all releases on record at the subject's δ."""
        return spent_epsilon(self.history, self.subject.delta)

    def expect(self, mechanism: Mechanism, count: int) -> None:
        """Find out at once whether `count` releases fit; where they do, `spend` need not ask for each."""
        more = [*self.history, (mechanism, count)]
        if self.epsilon is not None and spent_epsilon(more, self.subject.delta) <= self.epsilon:
            self._affordable = (mechanism, count)

    def spend(self, mechanism: Mechanism, count: int = 1, note: str = "") -> None:
        """Enter `count` releases of `mechanism`; when this returns they are on disk, and may be made.

        note: for people, such as "step 3". Never anything of the data.

        Raises:
            PrivacyError: they would exceed the budget. Nothing was entered.
            InputError: the file cannot be written. Nothing may be released.
        """
        if count < 1:
            raise InputError(f"{count} releases cannot be entered; it must be at least 1")
        self._require_room(mechanism, count)
        self._append(asdict(mechanism) | {"count": count, "note": note})
        self._count(mechanism, count)
        if self._affordable is not None:
            self._affordable = (mechanism, self._affordable[1] - count)

    def _require_room(self, mechanism: Mechanism, count: int) -> None:
        if self.epsilon is None:
            return
        known, left = self._affordable or (mechanism, 0)
        if known != mechanism or left < count:
            most = max(count, _LOOK_AHEAD)
            left = affordable(self.epsilon, self.subject.delta, mechanism, self.history, most)
            self._affordable = (mechanism, left)
        if left < count:
            raise PrivacyError(
                f"{self.path}: {self.releases} releases have spent epsilon {self.spent():.4g} of {self.epsilon:g} at delta "
                f"{self.subject.delta:g}; {count} more at noise multiplier {mechanism.noise_multiplier:.4g} and sampling "
                f"rate {mechanism.sampling_rate:.3g} would exceed it. Nothing was released; stop here, or raise epsilon"
            )

    def copy_to(self, path: Path) -> None:
        """Write all that is on record to `path`, on disk when this returns."""
        write_whole(path, self._contents())

    def require(self, copy: Path) -> None:
        """Raise PrivacyError unless the record begins with all of `copy`: else releases that were made have been lost."""
        try:
            known = copy.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read the copy of the ledger {copy}: {reason_of(error)}") from None
        if not self._contents().startswith(known):
            raise PrivacyError(
                f"the privacy ledger {self.path} does not hold all that {copy} does: it was deleted, cut or exchanged. Put "
                f"the right one back; in its absence that copy is the least that was spent"
            )

    def close(self) -> None:
        """Let the file go."""
        with contextlib.suppress(OSError):
            os.close(self._file)
        self._file = -1

    def __enter__(self) -> PrivacyLedger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _contents(self) -> bytes:
        return os.pread(self._file, self._length, 0)

    def _read(self) -> None:
        size = os.fstat(self._file).st_size
        whole = os.pread(self._file, size, 0)
        complete = whole[: whole.rfind(b"\n") + 1]
        if len(complete) < size:  # being written when the machine stopped: its release was not made
            os.ftruncate(self._file, len(complete))
        self._length, self._chain = len(complete), ""
        lines = complete.splitlines()
        if not lines:
            self._append({"format": FORMAT} | asdict(self.subject))
            _sync_directory(self.path.parent)
            return
        self._check_header(self._parse(lines[0], 1))
        for number, line in enumerate(lines[1:], start=2):
            record = self._parse(line, number)
            try:
                mechanism, count = Mechanism(record["noise_multiplier"], record["sampling_rate"]), int(record["count"])
            except (KeyError, TypeError, ValueError, InputError):
                raise self._damaged(number) from None
            if count < 1:
                raise self._damaged(number)
            self._count(mechanism, count)

    def _count(self, mechanism: Mechanism, count: int) -> None:
        self._counts[mechanism] += count
        self._last = mechanism

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            record = dict(json.loads(line))
            chain = record.pop("chain")
        except (ValueError, TypeError, KeyError):
            raise self._damaged(number) from None
        if chain != _link(self._chain, record):
            raise self._damaged(number)
        self._chain = str(chain)
        return record

    def _check_header(self, header: dict[str, Any]) -> None:
        if header.get("format") != FORMAT:
            raise PrivacyError(f"{self.path} is not a privacy ledger of this version ({FORMAT})")
        for name, wanted in asdict(self.subject).items():
            if header.get(name) != wanted:
                shown = "another dataset" if name == "dataset" else f"{name} {header.get(name)}, not {wanted}"
                raise PrivacyError(
                    f"the privacy ledger {self.path} is about {shown}: what it has spent says nothing of this run. Give "
                    f"the ledger that belongs to this dataset and delta, or a path where there is none yet"
                )

    def _damaged(self, number: int) -> PrivacyError:
        return PrivacyError(
            f"the privacy ledger {self.path} is damaged at line {number}: what was spent cannot be known from it. Put back "
            f"a copy (each checkpoint has one) that holds all releases; do not go on with less"
        )

    def _append(self, record: dict[str, Any]) -> None:
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


def _sync_directory(directory: Path) -> None:
    """The new file's name is on disk too."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
