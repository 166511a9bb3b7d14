"""Name the events of a federation's processes, and turn each into a line for people.

    listening   address                                 the server, once owners can connect
    round       number, contributed, opened, seconds    the server, after every round
    adapter     directory                               server and owners, at the end
    failed      reason                                  server and owners, in the place of the rest

`reporting` prints them as lines of JSON for the program that started the process, or as lines for people.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from hecompile.errors import HecompileError, InputError
from hecompile.runtime.wire.events import emit

LISTENING, ROUND, ADAPTER, FAILED = "listening", "round", "adapter", "failed"
_LINES = {
    LISTENING: "listening on {address}",
    ROUND: "round {number}: {contributed} contributed, {opened} opened, {seconds:.1f} s",
    ADAPTER: "adapter: {directory}",
}


class Report(Protocol):
    """Receive an event and its fields, as `hecompile.runtime.wire.events.emit` does."""

    def __call__(self, event: str, /, **fields: str | int | float | None) -> None: ...


def line_for(event: str, fields: Mapping[str, Any]) -> str:
    """Return an event as people read it on a terminal."""
    return _LINES[event].format_map(fields)


@contextmanager
def reporting(events: str) -> Iterator[Report]:
    """Yield how a command reports: `json`, where a failure is an event too, or `text` for people.

    Raises InputError for other values of `events`.
    """
    if events not in ("text", "json"):
        raise InputError(f"--events is text or json, got {events!r}")
    if events == "text":
        yield lambda event, /, **fields: print(line_for(event, fields), flush=True)
        return
    try:
        yield emit
    except HecompileError as error:
        emit(FAILED, reason=str(error))
        raise
