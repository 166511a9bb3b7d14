"""Read the text of a conversion from files that a command writes, and name the command where they are missing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.polynomial.conversion import DOCUMENTS, RECIPES
from hecompile.compiler.frontend import load_checkpoint
from hecompile.errors import InputError
from hecompile.models import REDUCED_LLAMA, TINY_LLAMA
from hecompile.models.worlds import public_world
from hecompile.models.worlds.public_world import documents
from hecompile.runtime.conversion.data import load_rows
from hecompile.runtime.conversion.recipe import ConversionData, load_conversion
from hecompile.runtime.conversion.train import _recipe_of
from tests.conftest import ROOT
from tests.runtime.conversion.support import recipe


def test_the_command_writes_the_documents_of_the_seed_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["public_world", str(tmp_path / "text"), "--documents", "40", "--heldout", "30", "--seed", "2"]
    monkeypatch.setattr("sys.argv", command)
    public_world.main()
    texts = {
        name: [json.loads(line)["text"] for line in (tmp_path / "text" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "heldout")
    }
    assert texts["train"] == documents(40, 2)
    assert texts["heldout"] == [text for text in documents(30, 2, heldout=True) if text not in texts["train"]]


def test_documents_follow_each_other_with_bos_and_eos(tmp_path: Path) -> None:
    public_world.write(tmp_path, 20, heldout=5)
    tokenizer = load_checkpoint(str(TINY_LLAMA)).tokenizer
    data = ConversionData(train_file=tmp_path / "train.jsonl", validation_file=tmp_path / "heldout.jsonl", length=16)
    rows, _ = load_rows(data, tokenizer)
    encoded = tokenizer(documents(20))["input_ids"]
    stream = [token for ids in encoded for token in (*ids, tokenizer.eos_token_id)]
    assert rows.flatten().tolist() == stream[: len(stream) // 16 * 16]


def test_a_missing_text_names_the_command(tmp_path: Path) -> None:
    missing = tmp_path / "text" / "train.jsonl"
    data = ConversionData(train_file=missing, validation_file=missing, length=16)
    command = f"python -m hecompile.models.worlds.public_world {missing.parent}"
    with pytest.raises(InputError, match=f"no text {missing}.*{command}"):
        load_rows(data, load_checkpoint(str(REDUCED_LLAMA)).tokenizer)


def test_the_key_of_older_recipes_names_the_command(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\nout: o\nnorm: polynomial\ndata: {generated_documents: 300, seed: 2}\n")
    with pytest.raises(InputError, match=r"public_world DIRECTORY --documents 300 --seed 2`, and give train_file"):
        load_conversion(path)


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_says_how_its_text_is_written(name: str) -> None:
    path = ROOT / "models" / "recipes" / RECIPES[name]
    directory = load_conversion(path).data.train_file.resolve().parent.relative_to(ROOT)
    command = re.search(r"public_world (\S+) --documents (\d+)$", path.read_text(), flags=re.MULTILINE)
    assert command is not None and command.groups() == (str(directory), str(DOCUMENTS[name]))


def test_a_state_of_an_older_version_is_read(tmp_path: Path) -> None:
    wanted = recipe(tmp_path / "out", norm={"form": "exact"})
    stored = wanted.model_dump(mode="json")
    stored["norm"]["form"] = "rmsnorm"
    stored["data"] |= {"generated_documents": None, "generated_heldout": 100, "seed": 0}
    assert _recipe_of(stored) == wanted
    stored["data"] |= {"generated_documents": 300, "train_file": None, "validation_file": None}
    assert _recipe_of(stored) is None
