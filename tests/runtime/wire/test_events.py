"""Event lines: what one process emits another reads, and other lines are no events."""

from __future__ import annotations

import pytest

from hecompile.runtime.wire.events import emit, read_event


def test_an_event_is_read_as_it_was_emitted(capsys):
    emit("listening", address="tcp://127.0.0.1:7700", pid=3, seconds=0.5, engine=None)
    (line,) = capsys.readouterr().out.splitlines()
    assert read_event(line) == {
        "event": "listening", "address": "tcp://127.0.0.1:7700", "pid": 3, "seconds": 0.5, "engine": None,
    }  # fmt: skip


def test_a_line_break_within_a_field_stays_on_the_line(capsys):
    emit("ended", reason="first\nsecond")
    (line,) = capsys.readouterr().out.splitlines()
    assert read_event(line) == {"event": "ended", "reason": "first\nsecond"}


@pytest.mark.parametrize(
    "line", ["", "listening on tcp://127.0.0.1:1", "[]", "3", '{"address": "x"}', '{"event": 1}', "[" * 9999]
)
def test_another_line_is_no_event(line):
    assert read_event(line) is None
