"""Check that whatever the pages name exists: files, modules, links, commands and their options, benchmark sections."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer

from benchmarks import SECTIONS
from hecompile.cli.main import app
from tests.conftest import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "THREAT_MODEL.md", ROOT / "benchmarks" / "README.md", *sorted(DOCS.glob("*.md"))]
MOST_README_LINES = 150
FOLDERS = "hecompile|passes|runtime|models|benchmarks|tests|docs|deploy"
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def named_paths(text: str) -> set[str]:
    """Return paths that begin with a folder of the repository, and quoted Python files; a ledger counts as its data file."""
    found = re.findall(rf"(?<![\w./])(?:{FOLDERS})/[\w./*-]*[\w*]", text) + re.findall(r"`([\w/*.]+\.py)`", text)
    return {path.removesuffix(".ledger") for path in found}


def named_objects(text: str) -> Iterator[str]:
    """Yield dotted names; `a.b.{C, D}` and `from a.b import C, D` are two names each."""
    for module, braced in re.findall(r"\b((?:hecompile|benchmarks)(?:\.[A-Za-z_]\w*)+)(?:\.\{([\w, ]+)\})?", text):
        yield from (f"{module}.{name}" for name in braced.split(", ")) if braced else (module,)
    for module, names in re.findall(r"from (hecompile[\w.]*) import ([\w, ]+)", text):
        yield from (f"{module}.{name}" for name in names.split(", "))


def exists(name: str) -> bool:
    """Tell whether a dotted name is a module, or an attribute of one, or of one of its classes."""
    head, *rest = name.split(".")
    found: object = importlib.import_module(head)
    for part in rest:
        head = f"{head}.{part}"
        if not hasattr(found, part):
            try:
                importlib.import_module(head)
            except ModuleNotFoundError:
                return False
        found = getattr(found, part)
    return True


def command_lines(text: str) -> list[list[str]]:
    """Return the words of every line of an indented block that runs hecompile, comments left out."""
    lines = re.findall(r"^ {4,}hecompile (.*)$", text.replace("\\\n", " "), flags=re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def heading_anchor(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pages
def test_the_files_that_a_page_names_are_there(page: Path) -> None:
    missing = {path for path in named_paths(page.read_text(encoding="utf-8")) if not any(ROOT.glob(path))}
    assert missing == set()


@pages
def test_the_modules_and_attributes_that_a_page_names_are_there(page: Path) -> None:
    assert [name for name in named_objects(page.read_text(encoding="utf-8")) if not exists(name)] == []


@pages
def test_the_modules_that_a_page_runs_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for module, section in re.findall(r"\bpython -m ([\w.]+)(?: ([\w]+))?", text):
        assert module in ("venv", "benchmarks") or exists(module)
        assert module != "benchmarks" or not section or section in (*SECTIONS, "SECTION")


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in map(heading_anchor, headings), target


@pages
def test_the_commands_of_a_page_have_these_options(page: Path) -> None:
    for words in command_lines(page.read_text(encoding="utf-8")):
        command: click.Command = typer.main.get_command(app)
        while hasattr(command, "commands"):
            first = words.pop(0).split("|")  # as in `hecompile federation serve|join`
            assert set(first) <= command.commands.keys(), first
            command = command.commands[first[0]]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        used = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert used <= known, f"{command.name}: {used - known}"


def all_commands(command: click.Command, path: str = "hecompile") -> Iterator[str]:
    if not hasattr(command, "commands"):
        yield path
        return
    for name, below in command.commands.items():
        yield from all_commands(below, f"{path} {name}")


def test_the_command_line_page_has_every_command() -> None:
    page = (DOCS / "command-line.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(hecompile [\w ]+)` \|", page, flags=re.MULTILINE)
    assert sorted(listed) == sorted(all_commands(typer.main.get_command(app)))


def test_the_benchmarks_page_has_every_section() -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)) == set(SECTIONS)


def test_the_index_leads_to_every_page() -> None:
    links = re.findall(r"\]\(([\w-]+\.md)", (DOCS / "README.md").read_text(encoding="utf-8"))
    assert sorted(links) == sorted(path.name for path in DOCS.glob("*.md") if path.name != "README.md")


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MOST_README_LINES


def test_what_is_missing_is_found() -> None:
    text = "`he/gone.py` hecompile.he.scheme.gone models/gone.jsonl.ledger and hecompile.plan.{costs, gone}"
    assert named_paths(text) == {"he/gone.py", "models/gone.jsonl"}
    assert [name for name in named_objects(text) if not exists(name)] == ["hecompile.he.scheme.gone", "hecompile.plan.gone"]
