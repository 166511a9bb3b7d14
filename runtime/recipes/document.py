"""Load a YAML recipe of any kind: overrides, relative paths, errors that name the place.

A relative path in the file is relative to the file's directory, so that a recipe and its data can be moved together; one in
an override is relative to the working directory, as on any command line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from hecompile.errors import InputError
from hecompile.runtime.recipes.key_hints import explain, explain_other_kind, suggest
from hecompile.runtime.recipes.section import Section
from hecompile.runtime.recipes.yaml_text import parse_yaml, read_yaml

Kind = TypeVar("Kind", bound=Section)
Resolve = Callable[[dict[str, Any], Path], None]
"""Makes the relative paths of a document, or of a part of one, relative to a directory, in place."""


def load_document(path: str | Path, overrides: Sequence[str], kind: type[Kind], resolve: Resolve) -> Kind:
    """Read the YAML file `path` as a recipe of some `kind`.

    Overrides are such as `training.max_steps=20`, the right-hand side in YAML; they are applied before the whole is
    validated. Raises InputError, with one message that names the key, for a missing or malformed file, an unknown or
    repeated key, and a value of the wrong type or out of range.
    """
    path = Path(path)
    document = _read(path, kind)
    if (other := explain_other_kind(document, kind)) is not None:
        raise InputError(f"{path} {other}")
    resolve(document, path.resolve().parent)
    for override in overrides:
        _apply_override(document, override, kind, resolve)
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        raise InputError(f"recipe {path}: {explain(error, kind)}") from None


def resolve_paths(document: dict[str, Any], keys: Iterable[tuple[str, ...]], directory: Path) -> None:
    """Make the paths at `keys` relative to `directory`, in place. Leave what is no text to pydantic."""
    for *sections, leaf in keys:
        for section in sections_at(document, sections):
            if isinstance(section.get(leaf), str):
                section[leaf] = str(_below(directory, section[leaf]))


def _below(directory: Path, path: str) -> Path:
    """Return `directory / path` without `..` at the joint: `directory` has no symbolic links that it could go back over."""
    parts = Path(path).parts
    while parts[:1] == ("..",):
        directory, parts = directory.parent, parts[1:]
    return directory.joinpath(*parts)


def sections_at(document: Any, place: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the mappings at a place of a document: none or one, or several where a list is on the way."""
    if isinstance(document, list):
        for element in document:
            yield from sections_at(element, place)
    elif isinstance(document, dict) and place:
        yield from sections_at(document.get(place[0]), place[1:])
    elif isinstance(document, dict):
        yield document


def _read(path: Path, kind: type[Section]) -> dict[str, Any]:
    document = read_yaml(path, f"the recipe {path}")
    if not isinstance(document, dict):
        raise InputError(f"the recipe {path} must be a YAML mapping with the keys {', '.join(kind.model_fields)}")
    return document


def _apply_override(document: dict[str, Any], override: str, kind: type[Section], resolve: Resolve) -> None:
    """Set the value at a dotted key, in place. Sections on the way are made where there are none."""
    dotted, equals, text = override.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        raise InputError(f"override {override!r} must have the form key=value, for example training.max_steps=20")
    value = parse_yaml(text, f"override {dotted}: the value")
    *sections, leaf = keys
    changed = {leaf: value}
    part: dict[str, Any] = changed
    for key in reversed(sections):
        part = {key: part}
    resolve(part, Path.cwd())
    target = document
    for key in sections:
        target = target.setdefault(key, {})
        if not isinstance(target, dict):
            raise InputError(f"override {dotted}: {key} is not a section of the recipe{suggest(keys, kind)}")
    target |= changed
