"""Refuse what a library would do unasked with what lies in a checkpoint's folder; take values from nothing else."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hecompile.checkpoint.loading import load_model
from hecompile.checkpoint.tokenizer import load_tokenizer
from hecompile.compiler.frontend import load_checkpoint
from hecompile.errors import InputError
from hecompile.runtime.model.plaintext import PlaintextPeftModel
from tests.support.tiny import tiny_llama
from tests.support.training import make_base, make_tokenizer

LORA = peft.LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
TOKENS = torch.tensor([[1, 70, 80, 90]])


def refused(directory: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_checkpoint(str(directory))
    message = str(caught.value)
    assert str(directory) in message and "\n" not in message
    return message


def change(path: Path, **changes: object) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    change(tensors)
    path.unlink()  # it may be mapped
    save_file(tensors, path, metadata={"format": "pt"})


def test_what_is_loaded_is_what_transformers_loads(saved: Path) -> None:
    model, tokenizer = load_model(saved)
    reference = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32, attn_implementation="eager").eval()
    assert torch.equal(model(TOKENS).logits, reference(TOKENS).logits)
    assert tokenizer("ab")["input_ids"] == make_tokenizer()("ab")["input_ids"]


def test_an_adapter_beside_the_model_is_refused_by_every_loader(damaged: Path) -> None:
    peft.get_peft_model(make_base(), LORA).save_pretrained(damaged)
    attached = AutoModelForCausalLM.from_pretrained(damaged)
    assert any("lora_A" in name for name, _ in attached.named_parameters())  # the library attaches it unasked
    assert str(damaged / "adapter_config.json") in refused(damaged)
    with pytest.raises(InputError, match="is an adapter in the folder of a model"):
        PlaintextPeftModel.from_pretrained(damaged, LORA, (8,), 2)
    (damaged / "adapter_config.json").unlink()
    assert "adapter_model.safetensors is an adapter" in refused(damaged)


def test_matrices_of_an_adapter_among_the_weights_are_refused(damaged: Path) -> None:
    change_weights(
        damaged, lambda tensors: tensors.update({"model.layers.0.self_attn.o_proj.lora_A.weight": torch.ones(2, 32)})
    )
    assert "o_proj.lora_A.weight: the model of config.json has no place for it" in refused(damaged)


def test_a_bias_that_the_configuration_does_not_speak_of_is_refused(damaged: Path) -> None:
    change_weights(damaged, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}))
    assert "q_proj.bias" in refused(damaged)


def test_code_in_a_pickle_is_not_run(damaged: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    (damaged / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Trap()}, damaged / "pytorch_model.bin")
    assert "pytorch_model.bin holds more than tensors" in refused(damaged)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_that_a_file_names_is_not_run(damaged: Path, tmp_path: Path, name: str) -> None:
    (damaged / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    change(damaged / name, auto_map={"AutoConfig": "own.Own", "AutoTokenizer": ["own.Own", None]})
    assert f"{name}: auto_map names Python code" in refused(damaged)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "generation_config.json"])
def test_links_to_elsewhere_are_refused(damaged: Path, tmp_path: Path, name: str) -> None:
    (damaged / name).rename(tmp_path / "elsewhere")
    (damaged / name).symlink_to(tmp_path / "elsewhere")
    assert f"{name} is a link to" in refused(damaged)


def test_the_hubs_cache_is_made_of_links(damaged: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in damaged.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert load_checkpoint(str(snapshot)).model.config.hidden_size == 32


@pytest.mark.parametrize("shard", ["../elsewhere.safetensors", "/etc/passwd", "own.bin", 5])
def test_an_index_that_leads_elsewhere_is_refused(damaged: Path, tmp_path: Path, shard: object) -> None:
    (damaged / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    change(damaged / "model.safetensors.index.json", weight_map={"model.norm.weight": shard})
    assert "is no safetensors file of this folder" in refused(damaged)


def test_shards_are_read(damaged: Path) -> None:
    tensors = {name: value.clone() for name, value in load_file(damaged / "model.safetensors").items()}
    (damaged / "model.safetensors").unlink()
    names, shards = sorted(tensors), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for number, shard in enumerate(shards):
        save_file({name: tensors[name] for name in names[number::2]}, damaged / shard)
    where = {name: shards[number % 2] for number, name in enumerate(names)}
    change(damaged / "model.safetensors.index.json", weight_map=where)
    assert torch.equal(load_checkpoint(str(damaged)).model(TOKENS).logits, tiny_llama()(TOKENS).logits)
    (damaged / shards[1]).unlink()
    assert f"{shards[1]} is missing" in refused(damaged)


def test_settings_of_generation_and_precision_are_not_taken_over(damaged: Path) -> None:
    change(damaged / "generation_config.json", max_new_tokens=1024, stop_strings=["a"], temperature=9.0, top_k=1)
    change(
        damaged / "config.json",
        torch_dtype="float16",
        dtype="float9",
        return_dict=False,
        max_length=3,
        _name_or_path="x/y",
    )
    model = load_checkpoint(str(damaged)).model
    assert model.dtype == torch.float32
    taken = {
        key: value
        for key, value in model.generation_config.to_diff_dict().items()
        if not key.startswith(("trans", "_"))
    }
    assert taken == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert torch.equal(model(TOKENS).logits, tiny_llama()(TOKENS).logits)


def test_a_tokenizers_files_are_those_of_its_folder(damaged: Path, tmp_path: Path) -> None:
    change(damaged / "tokenizer_config.json", tokenizer_file=str(tmp_path / "elsewhere.json"))
    assert "tokenizer_file is" in refused(damaged)


def test_a_chat_template_is_not_rendered(damaged: Path) -> None:
    (damaged / "chat_template.jinja").write_text("{{ raise_exception('rendered') }}")
    assert load_tokenizer(damaged)("ab")["input_ids"] == make_tokenizer()("ab")["input_ids"]


def test_nothing_is_looked_up_for_a_folder(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    load_checkpoint(str(damaged))
    (damaged / "tokenizer.json").unlink()
    assert "cannot load the tokenizer" in refused(damaged)


def test_a_tokenizer_larger_than_the_embedding_is_refused(damaged: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(damaged)
    assert "has ids for 260 tokens, the model an embedding for 259 (vocab_size): '<new>' has none" in refused(damaged)
