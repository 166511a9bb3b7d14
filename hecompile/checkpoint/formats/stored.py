"""Represent a tensor that lies in a file: what it is, and how its values are read when they are wanted.

Nothing is read ahead, so that a checkpoint in two bytes per weight never lies in memory beside its float32 form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hecompile.errors import InputError


@dataclass(frozen=True)
class Stored:
    """Describe a tensor of a file.

    Attributes:
        shape: of the tensor that `read` returns.
        kind: of its numbers, as the file names it.
        is_float: whether they are floating-point numbers, or stand for such.
        read: returns it in float32; it may be mapped from the file.
    """

    shape: tuple[int, ...]
    kind: str
    is_float: bool
    read: Callable[[], Tensor]


def cannot(place: Path, reason: str) -> InputError:
    """Return the error of weights that cannot be loaded."""
    return InputError(f"cannot load the weights of {place}: {reason}")


def merged(place: Path, parts: Iterable[tuple[Path, dict[str, Stored]]]) -> dict[str, Stored]:
    """Put the tensors of several files together. Raises InputError for one that is in two of them."""
    found: dict[str, Stored] = {}
    for path, tensors in parts:
        if twice := sorted(found.keys() & tensors.keys()):
            raise cannot(place, f"{twice[0]} is in {path.name} and in a file before it; delete one of the two")
        found |= tensors
    return found
