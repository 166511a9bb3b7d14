"""Measure how long each phase of an export takes, from its progress reports."""

from __future__ import annotations

import time
from collections.abc import Callable

_PREFIX = "seconds: "


class PhaseClock:
    """Add up the time from each report to the next under the name of the first. `clock` is for tests."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._phase, self._since = "", clock()

    def report(self, phase: str) -> None:
        """Note that `phase` begins or goes on."""
        now = self._clock()
        if self._phase:
            self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now

    def summary(self) -> str:
        """Return one line, in the order of the phases; those under a twentieth of a second are left out."""
        self.report(self._phase)
        shown = {phase: seconds for phase, seconds in self._seconds.items() if seconds >= 0.05}
        return _PREFIX + ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in shown.items())


def parse_summary(line: str) -> dict[str, float]:
    """Invert `PhaseClock.summary`: seconds by phase, to a tenth. Raises ValueError for another line."""
    if not line.startswith(_PREFIX):
        raise ValueError(f"not a summary of phases: {line!r}")
    parts = [part.rpartition(" ") for part in line.removeprefix(_PREFIX).split(", ") if part]
    return {phase: float(seconds) for phase, _, seconds in parts}
