"""Read a YAML recipe: unique keys, overrides, errors that name the place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from hecompile.errors import InputError
from hecompile.files import reason_of
from hecompile.runtime.recipes.key_hints import suggest
from hecompile.runtime.recipes.section import Section


def read_document(
    path: str | Path, overrides: Sequence[str], kind: type[Section], resolve: Callable[[dict[str, Any], Path], None]
) -> dict[str, Any]:
    """The mapping in the YAML file `path` of a recipe of some `kind` after overrides.

    `resolve` makes relative paths of a mapping, or of a part of one, relative to a directory: to that of the file, or, in an
    override, to the working directory. Raises InputError as `load_recipe` does, but for what its sections say.
    """
    path = Path(path)
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)  # noqa: S506  a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the recipe {path}: {reason_of(error)}") from None
    except yaml.YAMLError as error:
        raise InputError(f"the recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise InputError(f"the recipe {path} must be a YAML mapping with the keys {', '.join(kind.model_fields)}")
    resolve(document, path.resolve().parent)
    for override in overrides:
        _apply_override(document, override, kind, resolve)
    return document


class _UniqueKeyLoader(yaml.SafeLoader):
    """A SafeLoader that refuses a mapping with a repeated key, where YAML would silently keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str) or key in seen:
                problem = f"repeated or non-text key {key!r}"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _apply_override(
    document: dict[str, Any], override: str, kind: type[Section], resolve: Callable[[dict[str, Any], Path], None]
) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        raise InputError(f"override {override!r} must have the form key=value, for example training.max_steps=20")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"override {dotted}: the value is not valid YAML") from None
    change: dict[str, Any] = {keys[-1]: value}
    for key in reversed(keys[:-1]):
        change = {key: change}
    resolve(change, Path.cwd())
    target = document
    for key in keys[:-1]:
        change = change[key]
        target = target.setdefault(key, {})
        if not isinstance(target, dict):
            raise InputError(f"override {dotted}: {key} is not a section of the recipe{suggest(keys, kind)}")
    target[keys[-1]] = change[keys[-1]]
