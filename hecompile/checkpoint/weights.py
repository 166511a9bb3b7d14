"""Read a Llama's weights, in whatever format: names and shapes first, then values, a tensor at a time, in float32.

What a library would leave out with a warning (a bias, a matrix of LoRA, anything that the model has no place for) is
refused, for the model without it is another one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig

from hecompile.checkpoint.formats.bitsandbytes import dequantised
from hecompile.checkpoint.formats.safetensors_files import FLOATS
from hecompile.checkpoint.formats.stored import Stored, cannot
from hecompile.checkpoint.weight_files import stored_tensors
from hecompile.errors import InputError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_COMPUTED = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
"""Older files hold what follows from the configuration, too."""


def read_weights(place: Path, config: LlamaConfig) -> dict[str, Tensor]:
    """Return every weight of the model by its name in LlamaForCausalLM, float32; tensors may be mapped from the files.

    Raises InputError naming the tensor that is missing, superfluous, of another shape or kind, or not finite.
    """
    try:
        stored = dequantised(place, stored_tensors(place, config))
        found = {_name(key): tensor for key, tensor in stored.items() if not _COMPUTED.fullmatch(key)}
        _check_names(place, config, found)
        return _drop_tied_head(place, config, {name: _read(place, name, found[name]) for name in sorted(found)})
    except InputError:
        raise
    except Exception as error:  # safetensors and torch raise many kinds for a damaged file
        raise cannot(place, f"{' '.join(str(error).split())}; check that the weight files are complete") from error


def _name(key: str) -> str:
    """Return a tensor's name in LlamaForCausalLM: a LlamaModel, saved by itself, leaves out the first part."""
    return f"model.{key}" if key.startswith(("embed_tokens.", "layers.", "norm.")) else key


def _check_names(place: Path, config: LlamaConfig, found: dict[str, Stored]) -> None:
    missing, expected = [], set()
    for name, shape in _expected(config):
        expected.add(name)
        if name not in found:
            missing.append(name)
            continue
        stored = found[name]
        if stored.shape != shape:
            raise cannot(place, f"{name} is {list(stored.shape)}, but config.json asks for {list(shape)}")
        if not stored.is_float:
            raise cannot(place, f"{name} is {stored.kind}; supported: {', '.join(FLOATS)}")
    if missing:
        raise InputError(f"the weights of {place} lack {len(missing)} tensors, first: {missing[0]}")
    if superfluous := sorted(found.keys() - expected - {HEAD}):
        more = f" and {len(superfluous) - 1} more" if superfluous[1:] else ""
        raise cannot(place, f"{superfluous[0]}{more}: a Llama without biases and adapters has no place for it")


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


def _read(place: Path, name: str, stored: Stored) -> Tensor:
    value = stored.read()
    if not torch.isfinite(torch.stack(torch.aminmax(value))).all():  # no copy of the tensor, as isfinite of it makes
        raise cannot(place, f"{name} has values that are infinite or not a number")
    return value


def _drop_tied_head(place: Path, config: LlamaConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out a head that is the embedding. Raises InputError where it is said to be, and is not."""
    if not config.tie_word_embeddings or HEAD not in weights:
        return weights
    if not torch.equal(weights[HEAD], weights[EMBEDDING]):
        raise cannot(place, f"{HEAD} is not {EMBEDDING}, and config.json says tie_word_embeddings")
    return {name: value for name, value in weights.items() if name != HEAD}
