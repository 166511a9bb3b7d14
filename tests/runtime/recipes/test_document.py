"""Relative paths of every kind of recipe: those of the file against its directory, those of an override against the working
directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from hecompile.runtime.conversion.recipe import load_conversion
from hecompile.runtime.federation.recipe import load_federation
from hecompile.runtime.recipes.document import resolve_paths, sections_at

CONVERSION = """
model: checkpoint
out: converted
attention: power
data: {train_file: train.jsonl, validation_file: /data/heldout.jsonl}
"""
FEDERATION = """
model: checkpoint
owners:
  - {name: a, train_file: a.jsonl, plan: plans/a, worker: "unix://a.sock"}
  - {name: b, train_file: /data/b.jsonl, worker_bundle: worker}
training: {output_dir: run}
"""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")


def test_paths_of_a_conversion(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(CONVERSION)
    recipe = load_conversion(path, ["out=other"])
    assert recipe.model == "checkpoint"  # no directory: the name of a model on the hub
    assert recipe.data.train_file == tmp_path / "train.jsonl" and recipe.out == tmp_path / "elsewhere/other"
    assert recipe.data.validation_file == Path("/data/heldout.jsonl")
    (tmp_path / "checkpoint").mkdir()
    assert load_conversion(path).model == str(tmp_path / "checkpoint")


def test_paths_of_a_federation_and_of_all_its_owners(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(FEDERATION)
    recipe = load_federation(path, ["training.output_dir=run"])
    assert recipe.model == tmp_path / "checkpoint" and recipe.training.output_dir == tmp_path / "elsewhere/run"
    a, b = recipe.owners
    assert (a.train_file, a.plan, a.worker) == (
        tmp_path / "a.jsonl", tmp_path / "plans/a", f"unix://{tmp_path}/a.sock"
    )  # fmt: skip
    assert (b.train_file, b.worker_bundle) == (Path("/data/b.jsonl"), tmp_path / "worker")


def test_what_is_malformed_is_left_for_the_error_that_names_it() -> None:
    document = {"a": 1, "b": [{"c": 2}, None, {"c": "x"}], "d": {"c": None}}
    resolve_paths(document, [("a", "c"), ("b", "c"), ("d", "c"), ("e", "c"), ("a",)], Path("/top"))
    assert document == {"a": 1, "b": [{"c": 2}, None, {"c": "/top/x"}], "d": {"c": None}}
    assert list(sections_at(document, ["b"])) == [{"c": 2}, {"c": "/top/x"}]
