"""Keep rounds.jsonl, the public record of a federation's rounds."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from hecompile.errors import InputError
from hecompile.files import write_whole
from hecompile.runtime.federation.events import ROUND, Report
from hecompile.runtime.federation.output import ROUNDS_FILE, clear_server
from hecompile.runtime.federation.protocol.server_round import RoundResult
from hecompile.runtime.federation.state import ServerState


@dataclass(frozen=True)
class RoundRecord:
    """Hold a line of rounds.jsonl, which has no figure of any single owner."""

    round: int
    contributors: tuple[str, ...]
    opened_by: tuple[str, ...]
    samples: int
    coordinates: int
    bytes_up: int
    error_bound: float
    update_rms: float
    seconds: float


class RoundLog:
    """Write rounds.jsonl, report each round, and keep what the next one goes on from in `state`; a context manager.

    Opening it at the beginning of a federation removes what the server of an earlier one wrote. Open it when only the
    rounds are left to go wrong. One that is resumed keeps the records of the rounds that are done.
    """

    def __init__(self, out: Path, state: ServerState, report: Report, *, resume: bool = False) -> None:
        out.mkdir(parents=True, exist_ok=True)
        if resume:
            (out / ROUNDS_FILE).touch()
            kept = (out / ROUNDS_FILE).read_bytes().splitlines(keepends=True)[: state.complete]
            write_whole(out / ROUNDS_FILE, b"".join(kept))
        else:
            clear_server(out)
        self.state = state
        self._file = (out / ROUNDS_FILE).open("a", encoding="utf-8")
        self._report = report
        self._started = time.monotonic()

    def add(self, number: int, result: RoundResult) -> None:
        """Record round `number`, just finished; the next one's time begins now."""
        seconds = time.monotonic() - self._started
        record = RoundRecord(
            number, result.contributors, result.opened_by, result.samples, result.mean.size, result.bytes_up,
            result.error_bound, float(np.sqrt(np.mean(result.mean**2))), seconds,
        )  # fmt: skip
        self._file.write(json.dumps(asdict(record)) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.state.advance(number, result.adapter)  # last: a record without it is written anew
        counts = {"contributed": len(result.contributors), "opened": len(result.opened_by)}
        self._report(ROUND, number=number, **counts, seconds=seconds)
        self._started = time.monotonic()

    def __enter__(self) -> RoundLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read_records(directory: Path) -> list[RoundRecord]:
    """Read the records in a federation's output directory. Raises InputError, naming the line, where one is damaged."""
    path = directory / ROUNDS_FILE
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            records.append(RoundRecord(**json.loads(line)))
        except (ValueError, TypeError, RecursionError):
            raise InputError(f"{path}, line {number}: damaged, not the record of a round") from None
    return records
