"""Check single values of a configuration, each with an error that names file, key and value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

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


class Rule(Protocol):
    """Say what the value of a key may be."""

    @property
    def required(self) -> bool:
        """Say whether the key must be there; else the default is that of transformers."""

    @property
    def nullable(self) -> bool:
        """Say whether null is a value, and not the absence of one."""

    def read(self, where: str, key: str, value: object) -> object:
        """Return the checked value. Raises InputError for what it may not be."""


@dataclass(frozen=True)
class Whole:
    """Take whole numbers from `least` to `most`, and null where `nullable`."""

    most: int
    required: bool = True
    nullable: bool = False
    least: int = 1

    def read(self, where: str, key: str, value: object) -> int | None:
        return None if value is None and self.nullable else whole(where, key, value, self.least, self.most)


@dataclass(frozen=True)
class Number:
    """Take numbers above zero, and null where `nullable`."""

    nullable: bool = False
    required: bool = False

    def read(self, where: str, key: str, value: object) -> float | None:
        return None if value is None and self.nullable else number(where, key, value)


@dataclass(frozen=True)
class Flag:
    """Take true and false."""

    required: bool = False
    nullable: bool = False

    def read(self, where: str, key: str, value: object) -> bool:
        return flag(where, key, value)


@dataclass(frozen=True)
class Choice:
    """Take one of some words."""

    words: tuple[str, ...]
    required: bool = False
    nullable: bool = False

    def read(self, where: str, key: str, value: object) -> str:
        if not isinstance(value, str) or value not in self.words:
            raise InputError(f"{where}: {key} is {show(value)}; supported: {', '.join(self.words)}")
        return value
