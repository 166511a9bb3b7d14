"""Read what others wrote: text for a terminal, and JSON.

Every decoder of foreign bytes bounds their size before it is called; these functions leave one kind of error to catch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

MAX_SHOWN_CHARACTERS = 1000


def printable(text: object, most: int = MAX_SHOWN_CHARACTERS) -> str:
    """Make a peer's text safe to show and to log: at most `most` characters, each printable, so that no escape is left."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:most])


def parse_json(content: bytes | str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Parse JSON. Raises ValueError for anything else: no UTF-8, an endless number, lists nested without end.

    `pairs`, if given, makes each object of its keys and values.
    """
    try:
        return json.loads(content, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def finite(value: object) -> float | None:
    """Return a number of a JSON document as a finite float; None for anything else, an integer of 400 digits among it."""
    if type(value) not in (int, float):
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
