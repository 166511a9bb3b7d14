"""Mark models that can keep what does not change of an example, and tell them which example a row is."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from hecompile.runtime.recipes.prefix import PrefixCacheSection


class Prefix(Protocol):
    """Keep what the layers that no adapter changes make of each example."""

    @property
    def active(self) -> bool:
        """Say whether anything is kept at present. Batches then need `examples`."""

    def check(self, section: PrefixCacheSection, lengths: Sequence[int]) -> None:
        """Raise InputError where `keep` could keep nothing; `lengths` are those of all examples, in tokens."""

    def keep(self, section: PrefixCacheSection, lengths: Sequence[int]) -> AbstractContextManager[None]:
        """Keep it for as long as the context lasts. Raises InputError as `check` does."""


@runtime_checkable
class PrefixModel(Protocol):
    """Mark an `AdapterModel` that sends less where what does not change is kept.

    It takes `examples`, int64 [B], with each batch: the numbers of the rows' examples (`Example.number`). What is kept goes
    by that number and not by the text, so that nobody sees whether two examples are equal.
    """

    @property
    def prefix(self) -> Prefix:
        """Return what keeps it."""


def keeps_prefix(model: object) -> bool:
    """Tell whether batches for `model` need the numbers of their examples."""
    return isinstance(model, PrefixModel) and model.prefix.active
