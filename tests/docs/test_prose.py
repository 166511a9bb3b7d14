"""Check the prose of the sources: a docstring begins with an imperative verb and its first sentence stands alone."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT

ROOMS = ("hecompile", "passes", "runtime", "models", "benchmarks")
MOST_CHARACTERS = 190
"""Length of a docstring's first sentence."""

NOT_VERBS = """
a an the this that these those what which who whose whom where when why how whether if of as in on at by for from with
without to into over under between among about after before during until since because although while one two three
four seven both all every each any some no none nothing several many most more less same other another such it its
they their he his she her we our you your i there here and or but so not only also even just is are was were be been
being has have had do does did will would can could may might must shall should true false yes parts names values
numbers words bytes bits tokens
"""
VERBS_IN_S = """
pass process compress express address discuss miss focus access cross press guess bias toss dismiss suppress assess
possess bypass canvas
"""
VERBS_IN_OTHER_ENDINGS = "feed need embed seed shred proceed exceed bring ring mention implement speed"
BAD_START = re.compile(r"(?:(?<=[.!?:] )|^)(Of |What [^.?]{0,80}? is\b|The same\b)")
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def begins_with_a_verb(docstring: str) -> bool:
    """Return whether the first word may be a verb in the imperative; nouns that look like one are not told apart."""
    matched = re.match(r"`?([A-Za-z][A-Za-z'-]*)", docstring.strip())
    if matched is None:
        return True
    word = matched[1].lower()
    if word in NOT_VERBS.split() or (word.endswith("s") and word not in VERBS_IN_S.split()):
        return False
    return word in VERBS_IN_OTHER_ENDINGS.split() or not word.endswith(("ing", "ed", "tion", "ment", "ness"))


def docstring_violations(source: str) -> Iterator[str]:
    """Yield what is wrong with the docstrings of a module, each with its line."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, Documented) or (text := ast.get_docstring(node)) is None:
            continue
        if not isinstance(node, ast.Module) and node.name.startswith("test_"):
            continue  # a name that is a sentence by itself
        line = node.body[0].lineno
        if not begins_with_a_verb(text):
            yield f"{line}: docstring begins with no verb: {text.splitlines()[0][:90]}"
        first = re.split(r"(?<=[.!?])\s", text.replace("\n", " "), maxsplit=1)[0]
        if len(first) > MOST_CHARACTERS:
            yield f"{line}: first sentence has {len(first)} characters: {first[:80]}…"


def sentence_violations(source: str) -> Iterator[str]:
    """Yield sentences of comments and docstrings that begin with "Of", "What … is" or "The same", each with its line."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_prose = token.type == tokenize.STRING and token.string.lstrip("rRbBfF").startswith('"""')
        if token.type != tokenize.COMMENT and not is_prose:
            continue
        body = " ".join(token.string.lstrip("# rRbBfF").strip('"').split())
        for matched in BAD_START.finditer(body):
            yield f"{token.start[0]}: sentence begins with {matched[1]!r}: {body[matched.start() : matched.start() + 70]}"


@pytest.mark.parametrize("room", ROOMS)
def test_the_prose_of(room: str) -> None:
    violations = []
    paths = sorted((ROOT / room).rglob("*.py"))
    assert len(paths) > 5
    for path in paths:
        source = path.read_text(encoding="utf-8")
        found = [*docstring_violations(source), *sentence_violations(source)]
        violations += [f"{path.relative_to(ROOT)}:{violation}" for violation in found]
    assert violations == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ('"""Return the sum."""', 0),
        ('"""Address the worker. Of two the first."""', 1),
        ('"""The sum of both."""', 1),
        ('"""Returns the sum."""', 1),
        ('def f() -> None:\n    """What a worker is."""', 2),
        ('"""Return ' + "very " * 40 + 'much."""', 1),
        ("x = 1  # The same again", 1),
        ("x = 1  # as above", 0),
    ],
)
def test_violations_are_found(source: str, count: int) -> None:
    assert len([*docstring_violations(source), *sentence_violations(source + "\n")]) == count
