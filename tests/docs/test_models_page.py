"""The page of models has every family of the table, with its linears and its measured bytes."""

from __future__ import annotations

import re

import pytest

from benchmarks.training.families import _MODELS
from hecompile.checkpoint.families import FAMILIES
from tests.conftest import ROOT
from tests.support.families import BASIC

PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
_ROW = r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$"
ROWS = {row[0]: row for row in re.findall(_ROW, PAGE, re.MULTILINE) if row[0] != "model_type"}


def test_families_are_those_of_the_table_and_each_is_tested_and_measured() -> None:
    assert ROWS.keys() == FAMILIES.keys() == BASIC.keys() == {model.family for model in _MODELS.values()}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_has_title_and_linears(name: str) -> None:
    family, (_, title, linears, _) = FAMILIES[name], ROWS[name]
    assert title == family.title
    same = re.fullmatch(r"as `(\w+)`", linears)
    if same:
        assert FAMILIES[same[1]].products == family.products
    else:
        assert tuple(tuple(re.findall(r"`(\w+)`", part)) for part in linears.split(";")) == family.products


def test_bytes_are_those_of_the_stored_results() -> None:
    stored = (ROOT / "benchmarks" / "results" / "families.md").read_text(encoding="utf-8")
    for name, model in _MODELS.items():
        row = rf"^\| {re.escape(name)} \| {model.family} \|[^|]+\| (\d+) \| ([\d,]+) \| \d+ \| ([\d.]+) \|$"
        cells = re.search(row, stored, re.MULTILINE)
        assert cells is not None, name
        assert f"| {name} | `{model.family}` | {cells[1]} | {cells[2]} | {cells[3]} |" in PAGE
