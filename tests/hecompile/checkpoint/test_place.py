"""A misspelt path is told from a hub id, and never looked up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from typer.testing import CliRunner

from hecompile.bundles.ckks import CkksPlan, open_worker
from hecompile.bundles.client import ClientBundle
from hecompile.bundles.worker import WorkerBundle
from hecompile.checkpoint.adapter import read_settings
from hecompile.checkpoint.place import find_checkpoint, local_path
from hecompile.cli.main import app
from hecompile.errors import InputError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "models" / "tiny-llama").mkdir(parents=True)
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path)

    def refuse(*_: object, **__: object) -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    return tmp_path


@pytest.mark.parametrize(
    "name",
    ["./x", "../x", "/nowhere/x", "a/b/c", "models/tiny-lama", "models/else", "my-modl", "~/x", ".hidden", "x/", "a//b",
     "a b", "a\\b", "a/../b", "modéle"],
)  # fmt: skip
def test_a_path_is_never_looked_up(here: Path, name: str) -> None:
    with pytest.raises(InputError, match="it does not exist"):
        find_checkpoint(name)


@pytest.mark.parametrize(
    ("name", "near"), [("models/tiny-lama", "models/tiny-llama"), ("my-modl", "my-model"), ("./my_model", "my-model")]
)
def test_a_neighbour_is_named(here: Path, name: str, near: str) -> None:
    with pytest.raises(InputError, match=rf"did you mean {near}\?"):
        find_checkpoint(name)


@pytest.mark.parametrize("name", ["gpt2", "someone/some-model", "some.one/model_2"])
def test_a_hub_id_is_looked_up(here: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    (here / "model.safetensors").touch()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(here))
    assert find_checkpoint(name) == here and asked == [name]


def test_what_the_hub_says_is_one_line(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise OSError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError, match=r"no model a/b: .*\(no network\)"):
        find_checkpoint("a/b")


def test_a_recipes_model_is_seen_from_the_recipe(here: Path) -> None:
    assert local_path("tiny-lama", here / "models") == here / "models" / "tiny-lama"
    assert local_path("tiny-llama", here / "models") == here / "models" / "tiny-llama"
    assert local_path("someone/model", here / "models") is None


@pytest.mark.parametrize("read", [ClientBundle.open, WorkerBundle.open, CkksPlan.read, open_worker, read_settings])
def test_bundles_and_adapters_that_do_not_exist_name_a_neighbour(here: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(InputError, match=r"my-modl.*; did you mean .*my-model\?"):
        read(here / "my-modl")


@pytest.mark.parametrize("command", [("inspect",), ("infer", "--worker", "tcp://127.0.0.1:1", "x")])
def test_commands_name_a_neighbour(here: Path, command: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [command[0], "my-modl", *command[1:]])
    assert isinstance(result.exception, InputError) and "did you mean my-model?" in str(result.exception)
