"""Read a Llama's weights from safetensors files: names and shapes first, then values, in float32.

Pickles are not opened. What a library would leave out with a warning (a bias, a matrix of LoRA, anything that the model has
no place for) is refused, for the model without it is another one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import LlamaConfig

from hecompile.checkpoint.folder import read_object
from hecompile.checkpoint.values import show
from hecompile.errors import InputError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FLOATS = ("F64", "F32", "F16", "BF16")
_COMPUTED = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
"""Older files hold what follows from the configuration, too."""


def read_weights(directory: Path, config: LlamaConfig) -> dict[str, Tensor]:
    """Return every weight of the model by its name in LlamaForCausalLM, float32; tensors may be mapped from the files.

    Raises InputError naming the tensor that is missing, superfluous, of another shape or kind, or not finite.
    """
    try:
        with ExitStack() as stack:
            files = [stack.enter_context(safe_open(path, framework="pt")) for path in _files(directory)]
            found = {_name(key): (file, key) for file in files for key in _keys(file)}
            _check_names(directory, config, found)
            return _drop_tied_head(
                directory, config, {name: _read(directory, name, *found[name]) for name in sorted(found)}
            )
    except InputError:
        raise
    except Exception as error:  # safetensors and torch raise many kinds for a damaged file
        raise _cannot(directory, f"{' '.join(str(error).split())}; check that the weight files are complete") from error


def _cannot(directory: Path, reason: str) -> InputError:
    return InputError(f"cannot load the weights of {directory}: {reason}")


def _files(directory: Path) -> list[Path]:
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if not (directory / INDEX).is_file():
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
        remedy = (
            "is a pickle, which can run code and is not opened; load it where you trust it, and save it as safetensors"
        )
        others = f"; {pickles[0]} {remedy}" if pickles else ""
        raise _cannot(directory, f"there is neither {WEIGHTS} nor {INDEX}{others}")
    shards = read_object(directory / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise InputError(f"{directory / INDEX}: weight_map must be an object, tensor to file")
    names = list(dict.fromkeys(shards.values()))
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(f"{directory / INDEX}: {show(name)} is no safetensors file of this folder")
        if not (directory / name).is_file():
            raise _cannot(directory, f"{name} is missing, which {INDEX} names")
    return [directory / name for name in names]


def _keys(file: Any) -> list[str]:
    names: list[str] = list(file.keys())
    return [name for name in names if not _COMPUTED.fullmatch(name)]


def _name(key: str) -> str:
    """Return a tensor's name in LlamaForCausalLM: a LlamaModel, saved by itself, leaves out the first part."""
    return f"model.{key}" if key.startswith(("embed_tokens.", "layers.", "norm.")) else key


def _check_names(directory: Path, config: LlamaConfig, found: dict[str, tuple[Any, str]]) -> None:
    missing, expected = [], set()
    for name, shape in _expected(config):
        expected.add(name)
        if name not in found:
            missing.append(name)
            continue
        file, key = found[name]
        stored = file.get_slice(key)
        if list(stored.get_shape()) != list(shape):
            raise _cannot(directory, f"{name} is {list(stored.get_shape())}, but config.json asks for {list(shape)}")
        if stored.get_dtype() not in _FLOATS:
            raise _cannot(directory, f"{name} is {stored.get_dtype()}; supported: {', '.join(_FLOATS)}")
    if missing:
        raise InputError(f"the weights of {directory} lack {len(missing)} tensors, first: {missing[0]}")
    if superfluous := sorted(found.keys() - expected - {HEAD}):
        more = f" and {len(superfluous) - 1} more" if superfluous[1:] else ""
        raise _cannot(directory, f"{superfluous[0]}{more}: a Llama without biases and adapters has no place for it")


def _expected(config: LlamaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, ffn = config.hidden_size, config.intermediate_size
    width = config.head_dim or 0  # neither is missing from a configuration that was read here
    queries = config.num_attention_heads * width
    keys = (config.num_key_value_heads or 0) * width
    yield EMBEDDING, (config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        inside = f"model.layers.{layer}"
        yield f"{inside}.input_layernorm.weight", (hidden,)
        yield f"{inside}.post_attention_layernorm.weight", (hidden,)
        for name, shape in (
            ("q", (queries, hidden)),
            ("k", (keys, hidden)),
            ("v", (keys, hidden)),
            ("o", (hidden, queries)),
        ):
            yield f"{inside}.self_attn.{name}_proj.weight", shape
        for name, shape in (("gate", (ffn, hidden)), ("up", (ffn, hidden)), ("down", (hidden, ffn))):
            yield f"{inside}.mlp.{name}_proj.weight", shape
    yield "model.norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield HEAD, (config.vocab_size, hidden)


def _read(directory: Path, name: str, file: Any, key: str) -> Tensor:
    value: Tensor = file.get_tensor(key).to(torch.float32)
    if not torch.isfinite(value).all():
        raise _cannot(directory, f"{name} has values that are infinite or not a number")
    return value


def _drop_tied_head(directory: Path, config: LlamaConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out a head that is the embedding. Raises InputError where it is said to be, and is not."""
    if not config.tie_word_embeddings or HEAD not in weights:
        return weights
    if not torch.equal(weights[HEAD], weights[EMBEDDING]):
        raise _cannot(directory, f"{HEAD} is not {EMBEDDING}, and config.json says tie_word_embeddings")
    return {name: value for name, value in weights.items() if name != HEAD}
