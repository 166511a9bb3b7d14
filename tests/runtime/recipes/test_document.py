"""Relative paths of every kind of recipe: those of the file against its directory, those of an override against the working
directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hecompile.errors import InputError
from hecompile.runtime.conversion.recipe import load_conversion
from hecompile.runtime.federation.recipe import load_federation
from hecompile.runtime.recipes.document import resolve_paths, sections_at
from hecompile.runtime.recipes.training import load_recipe
from hecompile.runtime.worker.servers.fleet import load_fleet
from tests.conftest import ROOT

CONVERSION = """
model: checkpoint
out: converted
attention: power
data: {train_file: ../train.jsonl, validation_file: /data/heldout.jsonl}
"""
FEDERATION = """
model: checkpoint
owners:
  - {name: a, train_file: a.jsonl, plan: plans/a, worker: "unix://a.sock"}
  - {name: b, train_file: /data/b.jsonl, worker_bundle: worker}
training: {output_dir: run}
"""
TRAINING = """
model: client
worker: tcp://127.0.0.1:7700
data: {train_file: mine.jsonl}
training: {output_dir: run}
"""
FLEET = """
bundle: worker
replicas: 2
"""
KINDS = {"convert": CONVERSION, "federate": FEDERATION, "train": TRAINING, "worker deploy": FLEET}
LOADERS: dict[str, Callable[[Path], object]] = {
    "convert": load_conversion, "federate": load_federation, "train": load_recipe, "worker deploy": load_fleet
}  # fmt: skip


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")


def test_paths_of_a_conversion(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(CONVERSION)
    recipe = load_conversion(path, ["out=other"])
    assert recipe.model == "checkpoint"  # no directory: the name of a model on the hub
    assert recipe.data.train_file == tmp_path.parent / "train.jsonl" and recipe.out == tmp_path / "elsewhere/other"
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


@pytest.mark.parametrize("wanted", KINDS)
@pytest.mark.parametrize("given", KINDS)
def test_a_recipe_of_another_command_is_named_as_such(tmp_path: Path, wanted: str, given: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(KINDS[given])
    if given == wanted:
        LOADERS[wanted](path)
        return
    with pytest.raises(InputError) as caught:
        LOADERS[wanted](path)
    assert str(caught.value).startswith(
        f"{path} is a recipe of `hecompile {given}`: run that, or give one of `hecompile {wanted}` (docs/"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_shipped_recipe_is_of_its_own_kind_alone(kind: str) -> None:
    for path in sorted((ROOT / "models" / "recipes").glob("*.yaml")):
        own = path.name.split("-")[0].removesuffix(".yaml")
        command = {"federation": "federate", "convert": "convert"}.get(own, "train")
        if command == kind:
            LOADERS[kind](path)
        else:
            with pytest.raises(InputError, match=f"is a recipe of `hecompile {command}`"):
                LOADERS[kind](path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("data: x", "data: needs a section, that is keys with their values, got 'x'"),
        ("training: {output_dir: run, max_steps: 1.5}", "training.max_steps: Input should be a valid integer, got 1.5"),
        ("training: {output_dir: run, seed: a}", "training.seed: Input should be a valid integer, got 'a'"),
        ("training: {output_dir: run, learning_rate: 1e-3x}", "Input should be a valid number, got '1e-3x'"),
        ("training: {output_dir: [a]}", "training.output_dir: needs a path"),
        ("training: {output_dir: run, disable_tqdm: 7}", "training.disable_tqdm: Input should be a valid boolean, got 7"),
        ("model: [", "but found '<stream end>' at line 6, column 1"),
    ],
)
def test_a_wrong_value_is_shown_and_no_name_of_the_program(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    key = line.partition(":")[0]
    path.write_text("\n".join([*(one for one in TRAINING.splitlines() if not one.startswith(key)), line, ""]))
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    text = str(caught.value)
    assert message in text and str(path) in text
    assert "Section" not in text and "unicode string" not in text and "unable to" not in text
