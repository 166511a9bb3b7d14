"""Say what a server does: a sentence for people, or an event for the program that started it."""

from __future__ import annotations

import typer

from hecompile.errors import InputError
from hecompile.runtime.wire.events import emit

EVENTS = typer.Option(help="What is printed for people, text, or for the program that started it, json.")


def tell_address(events: str, address: str) -> None:
    """Say on standard output where a server listens: a sentence, or an event. Raises InputError for unknown `events`."""
    check_events(events)
    if events == "json":
        emit("listening", address=address)
    else:
        print(f"listening on {address}", flush=True)


def check_events(events: str) -> None:
    """Raise InputError unless `events` is text or json."""
    if events not in ("text", "json"):
        raise InputError(f"--events is text or json, got {events!r}")
