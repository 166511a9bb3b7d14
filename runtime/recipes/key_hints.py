"""Explain a wrong key in a recipe of any kind: which it is, and which key of that kind was probably meant."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator, Sequence

from pydantic import ValidationError

from hecompile.runtime.recipes.section import Section

_FIRST = "0"
"""Stands for any place in a list of sections, as in owners.0.name."""
_ALIKE = 0.7
"""Cutoff for `difflib`: a slip of one or two letters in a key passes, another word does not."""


def explain(error: ValidationError, kind: type[Section]) -> str:
    """Return the one message that helps most: an unknown key comes before the missing key that it was meant to be."""
    details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
    detail = details[0]
    dotted = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"unknown key {dotted}{suggest(detail['loc'], kind)}"
    if detail["type"] == "missing":
        return f"the key {dotted} is missing"
    message = detail["msg"].removeprefix("Value error, ")
    return f"{dotted}: {message}" if dotted else message


def suggest(unknown: Sequence[int | str], kind: type[Section]) -> str:
    """Return "; did you mean X?" for the nearest key of a recipe of `kind`: first one of the same section, then of any.

    Empty where none is near, and where `unknown` is a key of that kind: its name is then not what is wrong."""
    known = list(_keys(kind))
    key = tuple(_FIRST if str(part).isdigit() else str(part) for part in unknown)
    if key in known:
        return ""
    *section, leaf = key
    same = [one[-1] for one in known if list(one[:-1]) == section]
    for near in difflib.get_close_matches(leaf, same, n=1, cutoff=_ALIKE):
        return f"; did you mean {'.'.join([*map(str, unknown[:-1]), near])}?"
    by_leaf = {one[-1]: one for one in reversed(known)}
    for near in difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=_ALIKE):
        return f"; did you mean {'.'.join(by_leaf[near])}?"
    return ""


def _keys(kind: type[Section]) -> Iterator[tuple[str, ...]]:
    """Yield all keys of a recipe of `kind`: its own, then those of its sections."""
    for name in kind.model_fields:
        yield (name,)
    for name, field in kind.model_fields.items():
        for between, section in _sections(field.annotation):
            for key in _keys(section):
                yield (name, *between, *key)


def _sections(annotation: object) -> Iterator[tuple[tuple[str, ...], type[Section]]]:
    """Yield the sections in an annotation such as `list[OwnerSection]` or `PrivacySection | None`.

    Each comes with the keys between the field's name and those of the section.
    """
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield (), annotation
    place = (_FIRST,) if typing.get_origin(annotation) is list else ()
    for part in typing.get_args(annotation):
        yield from ((place + between, section) for between, section in _sections(part))
