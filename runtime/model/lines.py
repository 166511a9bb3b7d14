"""Read the lines of files that the data owner wrote: training data and prompts. No error shows any of their text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hecompile.errors import InputError
from hecompile.files import missing_path_hint, reason_of
from hecompile.runtime.model.tokens import has_half_characters

_BYTE_ORDER_MARK = "\ufeff"  # some editors begin a file with it


def read_lines(path: Path, kind: str) -> list[tuple[str, str]]:
    """Return the lines of the file that are not blank, each after the place that an error names.

    Raises InputError for a file that cannot be read or is not UTF-8; `kind` says what it was to be.
    """
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: the name has a NUL
        if isinstance(error, OSError) and (missing := missing_path_hint(path)) is not None:
            raise InputError(f"the {kind} {missing}") from None
        reason = reason_of(error) if isinstance(error, OSError) else str(error)
        raise InputError(f"cannot read the {kind} {path}: {reason}") from None
    return list(split_lines(content, str(path)))


def split_lines(content: bytes, name: str) -> Iterator[tuple[str, str]]:
    """Yield the lines of `content` that are not blank, as `read_lines` does. Raises InputError where it is not UTF-8."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        number = _newlines(content[: error.start].decode("utf-8")).count("\n") + 1
        raise InputError(
            f"{name} is not UTF-8 text (byte {error.start}): see line {number}, and save it as UTF-8"
        ) from None
    # Not splitlines(): U+2028 and its like are legal inside a JSON string.
    for number, line in enumerate(_newlines(text.removeprefix(_BYTE_ORDER_MARK)).split("\n"), start=1):
        if line.strip():
            yield f"{name}, line {number}", line


def _newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_object(line: str, where: str, keys: Sequence[str]) -> dict[str, Any]:
    """Return the JSON object that a line is. Whatever is under other keys than `keys` stays unread.

    Raises InputError, naming `where`, for what is no JSON object, or where one of `keys` is there twice or has half a
    character.
    """
    try:
        pairs = json.loads(line, object_pairs_hook=_Pairs)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON at column {error.colno}") from None
    except RecursionError:
        raise InputError(f"{where}: lists or objects are nested too deeply; give plain strings") from None
    except ValueError:  # Python reads no more than 4300 digits
        raise InputError(f"{where}: a number has too many digits; leave it out or make it a string") from None
    if not isinstance(pairs, _Pairs):
        raise InputError(f"{where}: not a JSON object; each line must be one, with strings under {', '.join(keys)}")
    names = [name for name, _ in pairs]
    record = dict(pairs)
    for key in keys:
        if names.count(key) > 1:
            raise InputError(f"{where}: {key} is given {names.count(key)} times; give it once")
        if isinstance(record.get(key), str) and has_half_characters(record[key]):
            raise InputError(f"{where}: {key} has half a character (\\ud800 to \\udfff alone); write the whole one")
    return record


class _Pairs(list[tuple[str, Any]]):
    """Hold the keys and values of a JSON object, with repeated keys; an array is any other list."""
