"""Keep rounds.jsonl, the public record of a federation's rounds."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hecompile.errors import InputError
from hecompile.runtime.federation.events import ROUND, Report
from hecompile.runtime.federation.output import ROUNDS_FILE, clear_server
from hecompile.runtime.federation.protocol.server_round import RoundResult


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
    """Write rounds.jsonl, report each round, and keep the adapter of the last good one in `adapter`; a context manager.

    Opening it removes what the server of an earlier federation wrote. Open it when only the rounds are left to go wrong.
    """

    def __init__(self, out: Path, adapter: NDArray[np.float32], report: Report) -> None:
        out.mkdir(parents=True, exist_ok=True)
        clear_server(out)
        self.adapter = adapter
        self._file = (out / ROUNDS_FILE).open("w", encoding="utf-8")
        self._report = report
        self._started = time.monotonic()

    def add(self, number: int, result: RoundResult) -> None:
        """Record round `number`, just finished; the next one's time begins now."""
        seconds = time.monotonic() - self._started
        record = RoundRecord(
            number, result.contributors, result.opened_by, result.samples, result.mean.size, result.bytes_up,
            result.error_bound, float(np.sqrt(np.mean(result.mean**2))), seconds,
        )  # fmt: skip
        self.adapter = result.adapter
        self._file.write(json.dumps(asdict(record)) + "\n")
        self._file.flush()
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
