"""Record what a data owner has released about a dataset, so that a privacy budget holds across runs and crashes.

    {"format": ..., "dataset": sha-256 of the file, "examples": N, "delta": δ, "chain": ...}       the first line
    {"noise_multiplier": z, "sampling_rate": q, "count": n, "note": ..., "chain": ...}             one per release

One file per dataset, append-only (`ledger_file`). A release is entered, and on disk, before the noisy value leaves the
function that made it; so a crash can at worst leave a release entered that never happened, never one that happened and is
not entered.

It guards an owner against mistakes, not against himself: who deletes the file, or cuts off whole lines at its end, has fewer
releases on record than there were. A checkpoint holds a copy, and a run that goes on from one asks for all that it has.

    {"format": ..., "examples": N, "delta": δ, "chain": ...}                                       the first line of a copy

The digest tells two files apart that differ in one line, so that a copy, which is handed on with its checkpoint, is without
it, and its chain starts without it. Put in the ledger's place it is bound to the dataset by a line {"dataset": ...}.

The ledger owns the history, δ and the budget: what these cost or still allow is asked of it, and it asks `accountant`.
"""

from __future__ import annotations

import json
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
    calibrate_noise,
    check_delta,
    check_epsilon,
    spent_epsilon,
    without_sampling,
)
from hecompile.runtime.privacy.ledger_file import LedgerFile, chained

FORMAT = "hecompile privacy ledger 1"
COPY_FORMAT = "hecompile privacy ledger copy 1"
_LOOK_AHEAD = 64
"""Releases checked against the budget per query (a query takes some tenths of a second)."""


@dataclass(frozen=True)
class Subject:
    """Name what a promise is about: the dataset by the SHA-256 of its file (hex), its number of examples, and δ.

    `dataset` is empty for what a checkpoint's copy of a ledger is about, which does not say so.
    """

    dataset: str
    examples: int
    delta: float

    @staticmethod
    def of_file(path: str | Path, examples: int, delta: float) -> Subject:
        """Return the subject of the file at `path`, which holds `examples`. Raises InputError for a δ that promises
        nothing."""
        check_delta(delta, examples)
        try:
            digest = file_sha256(Path(path))
        except OSError as error:
            raise InputError(f"cannot read the dataset {path}: {reason_of(error)}") from None
        return Subject(digest, examples, delta)

    @staticmethod
    def of_ledger(path: str | Path) -> Subject:
        """Read what the ledger at `path`, or a copy of one, is about. Raises InputError where there is none, PrivacyError
        where it is not one."""
        try:
            with Path(path).open("rb") as file:
                header = json.loads(file.readline())
            dataset = "" if header["format"] == COPY_FORMAT else str(header["dataset"])
            return Subject(dataset, int(header["examples"]), float(header["delta"]))
        except OSError as error:
            raise InputError(f"cannot read the privacy ledger {path}: {reason_of(error)}") from None
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            raise PrivacyError(f"{path} is not a privacy ledger, or its first line is damaged") from None


class PrivacyLedger:
    """Hold an open ledger. `spend` before every release; `close` at the end, or use it in a `with`.

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
        self._releases: list[dict[str, Any]] = []
        self._last: Mechanism | None = None
        self._known_to_fit: tuple[Mechanism, int] | None = None
        self._file = LedgerFile(self.path)
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    @property
    def history(self) -> History:
        """List all releases on record, each mechanism with how often."""
        return list(self._counts.items())

    @property
    def last(self) -> Mechanism | None:
        """Return the mechanism of the latest release."""
        return self._last

    @property
    def releases(self) -> int:
        """Count the releases on record."""
        return sum(self._counts.values())

    def spent(self) -> float:
        """Return the ε of all releases on record at the subject's δ."""
        return spent_epsilon(self.history, self.subject.delta)

    def spent_without_sampling(self) -> float:
        """Return their ε to somebody who knows who was in each sample."""
        return spent_epsilon(without_sampling(self.history), self.subject.delta)

    def spent_with(self, mechanism: Mechanism, count: int) -> float:
        """Return the ε that `count` more releases of `mechanism` would lead to."""
        return spent_epsilon([*self.history, (mechanism, count)], self.subject.delta)

    def affordable(self, mechanism: Mechanism, most: int) -> int:
        """Return how many more releases of `mechanism` the budget allows, at most `most`."""
        if self.epsilon is None:
            return most
        return affordable(self.epsilon, self.subject.delta, mechanism, self.history, most)

    def calibrate(self, sampling_rate: float, releases: int) -> float:
        """Return the smallest noise multiplier with which the budget allows `releases` more.

        Raises InputError where no noise is enough, and where there is no budget to calibrate for.
        """
        if self.epsilon is None:
            raise InputError(f"{self.path}: noise is calibrated for a budget; give epsilon, or the noise itself")
        try:
            return calibrate_noise(self.epsilon, self.subject.delta, sampling_rate, releases, self.history)
        except InputError as error:
            raise InputError(f"{error} ({self.path})") from None

    def expect(self, mechanism: Mechanism, count: int) -> None:
        """Find out at once whether `count` releases fit; where they do, `spend` need not ask for each."""
        if self.epsilon is not None and self.spent_with(mechanism, count) <= self.epsilon:
            self._known_to_fit = (mechanism, count)

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
        record = asdict(mechanism) | {"count": count, "note": note}
        self._file.append(record)
        self._count(mechanism, count, record)
        if self._known_to_fit is not None:
            self._known_to_fit = (mechanism, self._known_to_fit[1] - count)

    def copy_to(self, path: Path) -> None:
        """Write all releases on record to `path`, on disk when this returns, and nothing that depends on the dataset."""
        header = {"format": COPY_FORMAT, "examples": self.subject.examples, "delta": self.subject.delta}
        write_whole(path, chained([header, *self._releases]))

    def require(self, copy: Path) -> None:
        """Raise PrivacyError unless the record begins with all of `copy`: else releases that were made have been lost.

        A copy of an earlier version names the dataset too, which must then be this one.
        """
        try:
            known = [json.loads(line) for line in copy.read_bytes().splitlines()]
            header, releases = dict(known[0]), [dict(record) for record in known[1:]]
        except OSError as error:
            raise InputError(f"cannot read the copy of the ledger {copy}: {reason_of(error)}") from None
        except (ValueError, TypeError, IndexError):
            raise PrivacyError(f"{copy} is not a copy of a privacy ledger; resume from another checkpoint") from None
        for record in releases:
            record.pop("chain", None)
        releases = [record for record in releases if "dataset" not in record]
        about = {name: value for name, value in asdict(self.subject).items() if name != "dataset" or name in header}
        same = all(header.get(name) == value for name, value in about.items())
        if not same or self._releases[: len(releases)] != releases:
            raise PrivacyError(
                f"the privacy ledger {self.path} does not hold all that {copy} does: it was deleted, cut or exchanged. Put "
                f"the right one back; in its absence that copy is the least that was spent"
            )

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> PrivacyLedger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _require_room(self, mechanism: Mechanism, count: int) -> None:
        if self.epsilon is None:
            return
        known, left = self._known_to_fit or (mechanism, 0)
        if known != mechanism or left < count:
            left = self.affordable(mechanism, max(count, _LOOK_AHEAD))
            self._known_to_fit = (mechanism, left)
        if left < count:
            raise PrivacyError(
                f"{self.path}: {self.releases} releases have spent epsilon {self.spent():.4g} of {self.epsilon:g} at delta "
                f"{self.subject.delta:g}; {count} more at noise multiplier {mechanism.noise_multiplier:.4g} and sampling "
                f"rate {mechanism.sampling_rate:.3g} would exceed it. Nothing was released; stop here, or raise epsilon"
            )

    def _read(self) -> None:
        records = self._file.records()
        _, header = next(records, (1, None))
        if header is None:
            self._file.append({"format": FORMAT} | asdict(self.subject))
            self._file.sync_name()
            return
        self._check_header(header)
        bound = None if header["format"] == COPY_FORMAT else str(header.get("dataset"))
        for number, record in records:
            if bound is None and record.keys() == {"dataset"}:
                bound = record["dataset"]
                continue
            try:
                mechanism, count = Mechanism(record["noise_multiplier"], record["sampling_rate"]), int(record["count"])
            except (KeyError, TypeError, ValueError, InputError):
                raise self._file.damaged(number) from None
            if count < 1:
                raise self._file.damaged(number)
            self._count(mechanism, count, record)
        self._bind(bound)

    def _count(self, mechanism: Mechanism, count: int, record: dict[str, Any]) -> None:
        self._counts[mechanism] += count
        self._last = mechanism
        self._releases.append(record)

    def _bind(self, dataset: str | None) -> None:
        """Bind a copy that was put in the ledger's place to the subject's dataset; `dataset` is what the file names."""
        if not self.subject.dataset:
            return
        if dataset is None:
            self._file.append({"dataset": self.subject.dataset})
        elif dataset != self.subject.dataset:
            raise self._about("another dataset")

    def _check_header(self, header: dict[str, Any]) -> None:
        if header.get("format") not in (FORMAT, COPY_FORMAT):
            raise PrivacyError(f"{self.path} is not a privacy ledger of this version ({FORMAT})")
        for name in ("examples", "delta"):
            wanted = getattr(self.subject, name)
            if header.get(name) != wanted:
                raise self._about(f"{name} {header.get(name)}, not {wanted}")

    def _about(self, what: str) -> PrivacyError:
        return PrivacyError(
            f"the privacy ledger {self.path} is about {what}: what it has spent says nothing of this run. Give the ledger "
            f"that belongs to this dataset and delta, or a path where there is none yet"
        )
