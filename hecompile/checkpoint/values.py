"""Check single values of a configuration, each with an error that names file, key and value."""

from __future__ import annotations

from hecompile.errors import InputError

_LARGEST_NUMBER = 1e30
"""Under float32's largest, with room for a product."""


def show(value: object) -> str:
    """Print a value of a file, at most 60 characters of it."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return "a number of very many digits"
    return text if len(text) <= 60 else text[:57] + "..."


def whole(where: str, key: str, value: object, least: int, most: int) -> int:
    """Return an integer from `least` to `most`. Raises InputError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InputError(f"{where}: {key} must be a whole number from {least} to {most}, got {show(value)}")
    return value


def number(where: str, key: str, value: object) -> float | int:
    """Return a number above zero that float32 holds. Raises InputError for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= _LARGEST_NUMBER:
        raise InputError(f"{where}: {key} must be a number above 0, got {show(value)}")
    return value


def flag(where: str, key: str, value: object) -> bool:
    """Return true or false. Raises InputError for anything else."""
    if not isinstance(value, bool):
        raise InputError(f"{where}: {key} must be true or false, got {show(value)}")
    return value
