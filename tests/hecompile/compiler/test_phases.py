"""The summary of phases, by a clock that the test moves."""

from __future__ import annotations

import pytest

from hecompile.compiler.phases import PhaseClock, parse_summary


def test_phases_add_up_and_parse_back() -> None:
    now = [100.0]
    clock = PhaseClock(lambda: now[0])
    for phase, seconds in (("load", 2.0), ("place", 0.01), ("hints (rows)", 3.0), ("hints (rows)", 4.5), ("write", 1.0)):
        clock.report(phase)
        now[0] += seconds
    line = clock.summary()
    assert line == "seconds: load 2.0, hints (rows) 7.5, write 1.0"
    assert parse_summary(line) == {"load": 2.0, "hints (rows)": 7.5, "write": 1.0}


def test_nothing_happened() -> None:
    assert parse_summary(PhaseClock(lambda: 0.0).summary()) == {}


def test_another_line_is_refused() -> None:
    with pytest.raises(ValueError, match="not a summary"):
        parse_summary("plan 0123")
