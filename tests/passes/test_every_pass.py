"""Check what every pass has, whatever it does: a name in the pipeline and on the map, options that are fields, a source."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys

import pytest

from hecompile.compiler.pipeline import PASSES
from tests.conftest import ROOT

POLYNOMIAL = ("approximate_softmax", "approximate_rmsnorm", "approximate_silu")


def test_every_file_is_a_registered_pass_and_in_the_architecture_pages_table() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `passes/(\w+)` \|(.*)\|$", page, re.MULTILINE))
    files = {path.stem: path.parent.name for path in (ROOT / "passes").rglob("*.py") if path.stem != "__init__"}
    assert set(files) == set(PASSES) and set(files.values()) == set(rows)
    for name, group in files.items():
        assert name in re.findall(r"\w+", rows[group])


@pytest.mark.parametrize("name", PASSES)
def test_options_are_the_fields_of_a_frozen_dataclass(name: str) -> None:
    kind = PASSES[name]
    *package, file = kind.__module__.split(".")
    assert file == name and package[:2] == ["hecompile", "passes"]
    options = list(inspect.signature(kind).parameters)
    if not dataclasses.is_dataclass(kind):
        assert not options
        return
    assert options == [field.name for field in dataclasses.fields(kind)]
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", POLYNOMIAL)
def test_what_stands_for_a_function_cites_its_source_and_says_what_its_error_is(name: str) -> None:
    text = sys.modules[PASSES[name].__module__].__doc__ or ""
    assert re.search(r"(arXiv|eprint) \d{4}[./]\d+", text)
    assert "error_bound" in text or "Error bounds" in text
    names = {field.name for field in dataclasses.fields(PASSES[name])}
    assert {"error", "margin", "domain_upper"} <= names
