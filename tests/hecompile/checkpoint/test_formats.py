"""Load the same model from every format that its weights come in, and refuse what is none of them."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from hecompile.checkpoint import place as hub
from hecompile.checkpoint.loading import load_model
from hecompile.checkpoint.place import find_checkpoint
from hecompile.errors import InputError
from tests.hecompile.checkpoint.test_folder import TOKENS, change, refused
from tests.support.tiny import tiny_llama

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def weights(directory: Path) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in load_file(directory / "model.safetensors").items()}


def logits(directory: Path) -> Tensor:
    model, _ = load_model(directory)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    return model(TOKENS).logits


def rounded(dtype: torch.dtype) -> Tensor:
    """Return the logits of the tiny Llama with its weights rounded to a type, computed in float32."""
    model = LlamaForCausalLM(tiny_llama().config)
    model.load_state_dict({name: value.to(dtype).float() for name, value in tiny_llama().state_dict().items()})
    return model.eval()(TOKENS).logits


def as_pickle(directory: Path, tensors: dict[str, Tensor] | None = None) -> Path:
    """Put `pytorch_model.bin` in the place of the safetensors."""
    torch.save(weights(directory) if tensors is None else tensors, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink(missing_ok=True)
    return directory / "pytorch_model.bin"


def in_shards(directory: Path, suffix: str, save: Callable[[dict[str, Tensor], Path], object]) -> list[Path]:
    tensors = weights(directory)
    (directory / "model.safetensors").unlink()
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    names, shards = sorted(tensors), [directory / f"{stem}-0000{number}-of-00003{suffix}" for number in (1, 2, 3)]
    for number, shard in enumerate(shards):
        save({name: tensors[name] for name in names[number::3]}, shard)
    where = {name: shards[number % 3].name for number, name in enumerate(names)}
    change(directory / f"{stem}{suffix}.index.json", weight_map=where, metadata={"total_size": 1})
    return shards


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
def test_half_precision_is_computed_with_in_float32(damaged: Path, kind: str, pickled: bool) -> None:
    change(damaged / "config.json", dtype=kind)
    halves = {name: value.to(HALVES[kind]) for name, value in weights(damaged).items()}
    if pickled:
        as_pickle(damaged, halves)
    else:
        (damaged / "model.safetensors").unlink()
        save_file(halves, damaged / "model.safetensors")
    assert torch.equal(logits(damaged), rounded(HALVES[kind]))
    assert not torch.equal(logits(damaged), tiny_llama()(TOKENS).logits)


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
def test_what_was_converted_is_not_kept_beside_its_float32_form(damaged: Path, pickled: bool) -> None:
    halves = {name: value.to(torch.bfloat16) for name, value in weights(damaged).items()}
    path = damaged / "model.safetensors"
    path.unlink()
    if pickled:
        path = as_pickle(damaged, halves)
    else:
        save_file(halves, path)
    model, _ = load_model(damaged)
    assert model.lm_head.weight.dtype == torch.float32
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_tensors_of_several_types_in_one_file(damaged: Path) -> None:
    tensors = weights(damaged)
    mixed = {name: value.double() if "norm" in name else value for name, value in tensors.items()}
    (damaged / "model.safetensors").unlink()
    save_file(mixed, damaged / "model.safetensors")
    assert torch.equal(logits(damaged), tiny_llama()(TOKENS).logits)


def test_a_pickle_of_tensors(damaged: Path) -> None:
    as_pickle(damaged)
    assert torch.equal(logits(damaged), tiny_llama()(TOKENS).logits)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_are_one_model(damaged: Path, suffix: str) -> None:
    shards = in_shards(damaged, suffix, save_file if suffix == ".safetensors" else torch.save)
    assert torch.equal(logits(damaged), tiny_llama()(TOKENS).logits)
    index = next(damaged.glob("*.index.json"))
    found = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**found, "extra": "../elsewhere" + suffix}}))
    assert f"is no {suffix.removeprefix('.')} file of this folder" in refused(damaged)
    index.write_text(json.dumps({"weight_map": found}))
    shards[1].unlink()
    assert f"{shards[1].name} is missing, which {index.name} names" in refused(damaged)


def test_a_tensor_in_two_shards_is_refused(damaged: Path) -> None:
    first, second, _ = in_shards(damaged, ".safetensors", save_file)
    name = next(iter(load_file(first)))
    save_file(load_file(second) | {name: load_file(first)[name]}, second)
    assert f"{name} is in {second.name} and in a file before it" in refused(damaged)


def test_safetensors_go_before_pickles(damaged: Path) -> None:
    (damaged / "pytorch_model.bin").write_bytes(b"never opened")
    assert torch.equal(logits(damaged), tiny_llama()(TOKENS).logits)


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
def test_a_head_that_is_tied_and_one_that_is_not(damaged: Path, pickled: bool) -> None:
    tied = "lm_head.weight" not in weights(damaged)
    assert tied == bool(tiny_llama().config.tie_word_embeddings)
    tensors = weights(damaged)
    embedding = tensors["model.embed_tokens.weight"]
    head = embedding.flip(0).contiguous()

    def save(**more: Tensor) -> None:
        if pickled:
            as_pickle(damaged, tensors | more)
        else:
            save_file(tensors | more, damaged / "model.safetensors")

    change(damaged / "config.json", tie_word_embeddings=True)
    tensors.pop("lm_head.weight", None)
    save(**{"lm_head.weight": embedding.clone()})  # of a file that has both
    model, _ = load_model(damaged)
    assert torch.equal(model.lm_head.weight, embedding) and model.lm_head.weight is model.model.embed_tokens.weight
    save(**{"lm_head.weight": head})
    assert "lm_head.weight is not model.embed_tokens.weight" in refused(damaged)
    change(damaged / "config.json", tie_word_embeddings=False)
    model, _ = load_model(damaged)
    assert torch.equal(model.lm_head.weight, head) and torch.equal(model.model.embed_tokens.weight, embedding)
    save()
    assert "lack 1 tensors, first: lm_head.weight" in refused(damaged)


def test_a_vocabulary_may_have_more_rows_than_the_tokenizer_has_tokens(damaged: Path) -> None:
    """Embeddings are often padded to a round number."""
    tensors = weights(damaged)
    rows = tensors["model.embed_tokens.weight"].shape[0]
    wider = {
        name: torch.cat([value, torch.ones(5, value.shape[1])]) if value.shape[0] == rows else value
        for name, value in tensors.items()
    }
    (damaged / "model.safetensors").unlink()
    save_file(wider, damaged / "model.safetensors")
    change(damaged / "config.json", vocab_size=rows + 5)
    model, tokenizer = load_model(damaged)
    assert len(tokenizer) == rows and model(TOKENS).logits.shape[-1] == rows + 5
    assert torch.equal(model(TOKENS).logits[..., :rows], tiny_llama()(TOKENS).logits)


def test_the_hubs_cache_with_shards(damaged: Path, tmp_path: Path) -> None:
    """Follows links from snapshots to blobs, and those alone."""
    in_shards(damaged, ".safetensors", save_file)
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(damaged.iterdir())):
        path.rename(blobs / f"{number:064x}")  # blobs are named by their hashes
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    assert torch.equal(logits(snapshot), tiny_llama()(TOKENS).logits)
    shard = next(snapshot.glob("*.safetensors"))
    target = shard.resolve().rename(tmp_path / "elsewhere")
    shard.unlink()
    shard.symlink_to(target)
    assert f"{shard.name} is a link to" in refused(snapshot)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model.norm.weight": {"deep": torch.ones(2)}}, "model.norm.weight in pytorch_model.bin is no plain tensor"),
        ({"model.norm.weight": torch.ones(32).to_sparse()}, "is no plain tensor"),
        ({3: torch.ones(2)}, "holds something without a name"),
        ([torch.ones(2)], "holds no tensors by name"),
    ],
    ids=["nested", "sparse", "nameless", "list"],
)
def test_pickles_of_something_else_are_refused(damaged: Path, content: object, words: str) -> None:
    as_pickle(damaged, content)  # type: ignore[arg-type]
    assert words in refused(damaged)


def test_a_pickle_with_whole_numbers_for_weights_is_refused(damaged: Path) -> None:
    tensors = weights(damaged)
    as_pickle(damaged, tensors | {"model.norm.weight": torch.ones(32, dtype=torch.int8)})
    assert "model.norm.weight is int8; supported: F64, F32, F16, BF16" in refused(damaged)


def test_archives_that_grow_are_not_unpacked(damaged: Path) -> None:
    path = as_pickle(damaged)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    assert "pytorch_model.bin is packed" in refused(damaged)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\0" * (1 << 26) + b"\0")
    assert "the pickle in pytorch_model.bin has 67108865 bytes" in refused(damaged)


def test_pickles_of_older_torch_and_cut_files_are_refused(damaged: Path) -> None:
    path = as_pickle(damaged)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "pytorch_model.bin is no archive of torch's" in refused(damaged)
    path.write_bytes(pickle.dumps({"model.norm.weight": 1}))
    assert "is no archive of torch's" in refused(damaged)


def test_a_folder_without_weights_says_which_are_looked_for(damaged: Path) -> None:
    (damaged / "model.safetensors").rename(damaged / "model-00001-of-00002.safetensors")
    message = refused(damaged)
    assert (
        "there is none of model.safetensors" in message
        and "model-00001-of-00002.safetensors belongs to no index" in message
    )


@pytest.mark.parametrize("has", ["model.safetensors", "pytorch_model.bin"])
def test_pickles_are_fetched_where_there_are_no_safetensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has: str
) -> None:
    asked: list[tuple[str, ...]] = []

    def fetch(name: str, patterns: tuple[str, ...]) -> Path:
        asked.append(patterns)
        if has == "model.safetensors":
            (tmp_path / has).touch()
        return tmp_path

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_fetch", fetch)
    assert find_checkpoint("someone/model") == tmp_path
    pickles = [any(".bin" in pattern for pattern in patterns) for patterns in asked]
    assert pickles == ([False] if has == "model.safetensors" else [False, True])


def test_weights_that_are_not_finite_are_refused(damaged: Path) -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        tensors = weights(damaged)
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value
        (damaged / "model.safetensors").unlink()
        save_file(tensors, damaged / "model.safetensors")
        with pytest.raises(InputError, match=r"1\.mlp\.down_proj\.weight has values that are infinite"):
            load_model(damaged)
