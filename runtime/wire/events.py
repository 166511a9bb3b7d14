"""Write and read lines of events, by which a process tells the one that started it what has happened.

An event is one line of standard output that holds a JSON object with its name under `event` and its fields beside it. Other
lines are for people, and `read_event` skips them.
"""

from __future__ import annotations

import json
from typing import Any

_NAME = "event"


def emit(event: str, /, **fields: str | int | float | None) -> None:
    """Print one event as a line of JSON, at once."""
    print(json.dumps({_NAME: event, **fields}), flush=True)


def read_event(line: str) -> dict[str, Any] | None:
    """Return the event that `line` holds, its name under `event`, or None where the line is no event."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or not isinstance(content.get(_NAME), str):
        return None
    return content
