"""Parse YAML that somebody wrote: unique text keys, a size and a depth that no recipe reaches, errors that name the line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from hecompile.errors import InputError
from hecompile.files import missing_path_hint, reason_of

MAX_BYTES = 1 << 18
_MAX_DEPTH = 32
_MAX_NODES = 100_000
"""Most values of a document, an alias counted as all that it stands for: nine lines of aliases can stand for 10^9."""


def read_yaml(path: Path, name: str) -> Any:
    """Return the document in the file at `path`; errors call it `name`. Raises InputError where it cannot be read."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(f"cannot read {name}: not UTF-8 (line {line})") from None
    except (OSError, ValueError) as error:  # ValueError: the name has a NUL
        if isinstance(error, OSError) and (missing := missing_path_hint(path)) is not None:
            raise InputError(f"the recipe {missing}" if name.startswith("the recipe") else missing) from None
        raise InputError(f"cannot read {name}: {reason_of(error) if isinstance(error, OSError) else error}") from None
    return parse_yaml(text, name)


def parse_yaml(text: str, name: str) -> Any:
    """Return the document that `text` is, of dictionaries with unique text keys, lists and scalars.

    Raises InputError, naming `name` and where YAML tells it the line, for anything else.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise InputError(f"{name} has more than {MAX_BYTES} bytes; no recipe is as long")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {}, set())
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        reason = re.sub(r'in "<unicode string>", (?=line)', "at ", " ".join(str(error).split()))
        raise InputError(f"{name} is not valid YAML: {reason}") from None


class _Loader(yaml.SafeLoader):
    """Refuse what YAML would take silently, or with an error of Python's own; otherwise a SafeLoader."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, "nested too deeply", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep=deep)
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError):  # such as a date 2024-99-99
            raise _refusal("a value that cannot be read; put text in quotes", node) from None
        if isinstance(value, str) and ("\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value)):
            raise _refusal("a NUL or half a character", node)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str) or key in seen:
                raise _refusal(f"repeated or non-text key {key!r}", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _count(node: yaml.Node, known: dict[int, int], above: set[int]) -> int:
    """Return how many values `node` stands for. Raises YAMLError where it stands for too many, or for itself."""
    if id(node) in above:
        raise _refusal("a value that holds itself", node)
    if id(node) in known:
        return known[id(node)]
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        inner = node.value
    elif isinstance(node, yaml.MappingNode):
        inner = [part for pair in node.value for part in pair]
    count = 1 + sum(_count(part, known, above | {id(node)}) for part in inner)
    if count > _MAX_NODES:
        raise _refusal(f"a value that stands for more than {_MAX_NODES} others", node)
    known[id(node)] = count
    return count


def _refusal(problem: str, node: yaml.Node) -> yaml.YAMLError:
    error: yaml.YAMLError = yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    return error
