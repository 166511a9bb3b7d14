"""Explain a wrong key in a recipe of any kind: which it is, and which key of that kind was probably meant."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence

from pydantic import ValidationError

from hecompile.runtime.recipes.section import Section

_FIRST = "0"
"""Stands for any place in a list of sections, as in owners.0.name."""
_ALIKE = 0.7
"""Cutoff for `difflib`: a slip of one or two letters in a key passes, another word does not."""

_MARKS: dict[str, tuple[tuple[str, ...], ...]] = {
    "train": (("worker",), ("worker_bundle",), ("connection",), ("privacy",), ("data", "training.output_dir")),
    "federate": (("owners",), ("federation",)),
    "convert": (("out",), ("training.polynomial_steps",), ("training.steps",)),
    "worker deploy": (("bundle",), ("shards",), ("replicas",), ("http_port",)),
}
"""Keys of each kind of recipe, by its command, that are keys of no other kind; of each inner tuple all must be there."""
_PAGES = {"train": "recipe", "federate": "federation", "convert": "conversion", "worker deploy": "fleet"}


def explain_other_kind(document: Mapping[str, object], kind: type[Section]) -> str | None:
    """Return that the file is a recipe of another command than `kind` is, or None where that cannot be told."""
    found = {command for command, marks in _MARKS.items() if any(all(_has(document, key) for key in mark) for mark in marks)}
    if len(found) != 1 or kind.command in found or not kind.command:
        return None
    (other,) = found
    return (
        f"is a recipe of `hecompile {other}`: run that, or give one of `hecompile {kind.command}` "
        f"(docs/{_PAGES[kind.command]}.md has an example)"
    )


def _has(document: object, dotted: str) -> bool:
    for key in dotted.split("."):
        if not isinstance(document, Mapping) or key not in document:
            return False
        document = document[key]
    return True


def explain(error: ValidationError, kind: type[Section]) -> str:
    """Return the one message that helps most: an unknown key comes before the missing key that it was meant to be."""
    details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
    detail = details[0]
    dotted = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"unknown key {dotted}{suggest(detail['loc'], kind)}"
    if detail["type"] == "missing":
        return f"the key {dotted} is missing"
    message = _reason(detail)
    return f"{dotted}: {message}" if dotted else message


def _reason(detail: typing.Any) -> str:
    """Say what is wrong with a value, and which it is, without the names of this program's classes."""
    message = str(detail["msg"])
    if detail["type"] == "value_error":
        return message.removeprefix("Value error, ")
    if detail["type"] in ("model_type", "dict_type"):
        message = "needs a section, that is keys with their values"
    elif detail["type"].startswith("path_"):
        message = "needs a path"
    message = re.sub(r", (unable to |got a number ).*|( after validation, not .*)", "", message)
    value = detail["input"]
    return f"{message}, got {value!r}" if isinstance(value, (str, int, float, bool, type(None))) else message


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
