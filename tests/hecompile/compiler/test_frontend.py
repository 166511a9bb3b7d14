"""Refuse everything but a checkpoint of a supported family, with one line that names the fault."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
from transformers import GPTJConfig, GPTJForCausalLM

from hecompile.compiler.frontend import load_checkpoint
from hecompile.errors import InputError


@pytest.fixture
def damaged(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def refused(directory: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_checkpoint(str(directory))
    message = str(caught.value)
    assert str(directory) in message and "\n" not in message
    return message


def change_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_good_checkpoint_loads(checkpoint: Path) -> None:
    loaded = load_checkpoint(str(checkpoint))
    assert loaded.name == str(checkpoint)
    assert loaded.model.config.hidden_size == 32 and not loaded.model.training
    assert loaded.tokenizer("ab")["input_ids"][0] == 1


def test_missing_directory(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere")


def test_a_file(checkpoint: Path) -> None:
    assert "is a file; give the directory" in refused(checkpoint / "config.json")


def test_directory_without_config(tmp_path: Path) -> None:
    assert "has no config.json" in refused(tmp_path)


def test_config_that_is_no_json(damaged: Path) -> None:
    (damaged / "config.json").write_text("{")
    refused(damaged)


def test_missing_weights(damaged: Path) -> None:
    (damaged / "model.safetensors").unlink()
    assert "cannot load the weights" in refused(damaged)


def test_corrupt_weights(damaged: Path) -> None:
    (damaged / "model.safetensors").write_bytes(b"\xff" * 4096)
    assert "cannot load the weights" in refused(damaged)


def test_truncated_weights(damaged: Path) -> None:
    path = damaged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "check that the weight files are complete" in refused(damaged)


def test_empty_weights(damaged: Path) -> None:
    (damaged / "model.safetensors").write_bytes(b"")
    assert "cannot load the weights" in refused(damaged)


def test_a_tensor_that_is_missing_is_named(damaged: Path) -> None:
    path = damaged / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    assert "lack 1 tensors, first: model.layers.1.mlp.up_proj.weight" in refused(damaged)


def test_a_tensor_of_another_shape(damaged: Path) -> None:
    change_config(damaged, intermediate_size=40)
    assert "cannot load the weights" in refused(damaged)


def test_an_architecture_that_is_not_supported(tmp_path: Path) -> None:
    config = GPTJConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8, rotary_dim=4)
    GPTJForCausalLM(config).save_pretrained(tmp_path)
    assert "has architecture 'gptj'; supported: llama, mistral, qwen2" in refused(tmp_path)


@pytest.mark.parametrize("option", ["attention_bias", "mlp_bias"])
def test_biases_that_the_weights_lack(damaged: Path, option: str) -> None:
    change_config(damaged, **{option: True})
    assert "_proj.bias" in refused(damaged)


def test_missing_tokenizer(damaged: Path) -> None:
    for path in damaged.glob("tokenizer*"):
        path.unlink()
    assert "cannot load the tokenizer" in refused(damaged)
