"""An export that reads weights where they lie, and keeps integers on the disk, gives what one in memory gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hecompile.checkpoint.loading import load_hollow, load_model
from hecompile.compiler import calibration, frontend, shelf
from hecompile.compiler.byte_model import in_bytes
from hecompile.compiler.linear import compile_checkpoint
from tests.hecompile.compiler.test_build import hashes
from tests.support.families import BASIC
from tests.support.tiny import OPTIONS
from tests.support.training import make_tokenizer


def test_large_weights_stay_on_the_disk_and_the_build_is_the_same(
    build: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frontend, "_LARGE", 0)
    monkeypatch.setattr(shelf, "_SMALL", 0)
    compile_checkpoint(str(checkpoint), tmp_path / "out", OPTIONS)
    assert hashes(tmp_path / "out") == hashes(build)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_weights_are_those_of_the_loaded_model_and_bytes_are_near_them(name: str, tmp_path: Path) -> None:
    BASIC[name].make().save_pretrained(directory := tmp_path / "model")
    make_tokenizer().save_pretrained(directory)
    model, _ = load_model(directory)
    hollow, _, weights = load_hollow(directory)
    for key, parameter in model.named_parameters(remove_duplicate=False):
        assert torch.equal(weights.read(key), parameter), key
    zeros = dict(hollow.named_parameters())
    assert all(set(parameter.stride()) == {0} for parameter in zeros.values())
    tokens = torch.tensor([[1, 5, 9, 4]])
    with torch.no_grad():
        wanted = model(tokens).logits
        with in_bytes(hollow, weights):
            found = hollow(tokens).logits
    assert float((found - wanted).norm() / wanted.norm()) < 0.03
    assert all(zeros[key] is parameter for key, parameter in hollow.named_parameters())


def test_a_large_model_writes_its_text_with_weights_of_one_byte(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_MOST_FLOATS", 0)
    opened = frontend.open_checkpoint(str(checkpoint))
    with calibration._filled(opened):
        rows = calibration._write_by_checkpoint(opened, 1, 5, 8)
    assert {len(row) for row in rows} == {8} and len({row[1:] for row in rows}) > 1
