"""Read a Llama's config.json: every setting that decides what is computed is checked, and no other one is taken over.

A library that reads the file itself obeys keys that nobody asked for (a precision, a quantiser, defaults of generation) and
meets a malformed value somewhere in the middle of its work. Here the error comes first, and names file, key and value.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from hecompile.checkpoint.folder import CONFIG, GENERATION_CONFIG, read_object, refuse_code
from hecompile.checkpoint.quantised import check_quantisation
from hecompile.checkpoint.rope import read_rope
from hecompile.checkpoint.values import flag, number, show, whole
from hecompile.errors import InputError

SUPPORTED_MODEL_TYPES = ("llama",)
POLYNOMIAL_KEY = "hecompile_polynomial"
"""What a converted checkpoint was trained for (`hecompile.compiler.polynomial_options`)."""
_ARCHITECTURES = ("LlamaForCausalLM", "LlamaModel")
_ACTIVATIONS = ("silu", "swish")
_MOST = {
    "vocab_size": 2**24, "hidden_size": 2**20, "intermediate_size": 2**22, "num_hidden_layers": 4096,
    "num_attention_heads": 2**16, "num_key_value_heads": 2**16, "head_dim": 2**16, "max_position_embeddings": 2**31,
}  # fmt: skip
"""Sizes beyond every model there is: a mistake in a file must not become a wait or a lack of memory."""
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_FIXED: dict[str, tuple[Any, ...]] = {
    "is_causal": (True,), "is_encoder_decoder": (False,), "add_cross_attention": (False,),
    "use_bidirectional_attention": (False,),
}  # fmt: skip


def read_configuration(directory: Path) -> LlamaConfig:
    """Return the configuration of the checkpoint in `directory`, made of checked values alone.

    Raises InputError naming file, key and value, and what is supported.
    """
    path = directory / CONFIG
    config, where = read_object(path), str(path)
    _check_architecture(path, config)
    sizes = _read_sizes(where, config)
    vocabulary = sizes["vocab_size"]
    ends = _tokens(where, "eos_token_id", config.get("eos_token_id", 2), vocabulary)
    settings: dict[str, Any] = {
        **sizes,
        "tie_word_embeddings": flag(where, "tie_word_embeddings", config.get("tie_word_embeddings", False)),
        "rms_norm_eps": number(where, "rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
        "rope_parameters": read_rope(where, config | {"max_position_embeddings": sizes["max_position_embeddings"]}),
        "bos_token_id": _token(where, "bos_token_id", config.get("bos_token_id", 1), vocabulary),
        "pad_token_id": _token(where, "pad_token_id", config.get("pad_token_id"), vocabulary),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
    }
    if config.get(POLYNOMIAL_KEY) is not None:
        settings[POLYNOMIAL_KEY] = config[POLYNOMIAL_KEY]
    try:
        return LlamaConfig(**settings, hidden_act="silu", attention_bias=False, mlp_bias=False)
    except Exception as error:  # transformers' own checks, of what is left
        raise InputError(f"{where}: transformers refuses it: {' '.join(str(error).split())}") from error


def read_answer_ends(directory: Path, config: LlamaConfig) -> list[int]:
    """Return the ids of the tokens that end an answer: those of generation_config.json, then those of config.json.

    Nothing else of generation_config.json is read. Raises InputError for ids that are outside of the vocabulary.
    """
    path, own = directory / GENERATION_CONFIG, config.eos_token_id
    found: list[int] = []
    if path.is_file():
        value = read_object(path).get("eos_token_id")
        found = _tokens(str(path), "eos_token_id", value, config.vocab_size)
    return list(dict.fromkeys([*found, *(own if isinstance(own, list) else [] if own is None else [own])]))


def _check_architecture(path: Path, config: Mapping[str, Any]) -> None:
    refuse_code(path, config)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in SUPPORTED_MODEL_TYPES:
        raise InputError(
            f"{path}: the model has architecture {show(kind)}; supported: {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    classes = config.get("architectures")
    if classes is not None and not (isinstance(classes, list) and any(name in _ARCHITECTURES for name in classes)):
        raise InputError(f"{path}: architectures is {show(classes)}; supported: {_ARCHITECTURES[0]}")
    check_quantisation(path, config)
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key) not in (None, False):
            raise InputError(
                f"{path}: {key} is {show(config[key])}: the model has biases in its linear layers, which is not supported"
            )
    for key, supported in _FIXED.items():
        if config.get(key) is not None and config[key] not in supported:
            raise InputError(f"{path}: {key} is {show(config[key])}; supported: {show(supported[0])}")
    activation = config.get("hidden_act", "silu")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise InputError(f"{path}: hidden_act is {show(activation)}; supported: {', '.join(_ACTIVATIONS)}")


def _read_sizes(where: str, config: Mapping[str, Any]) -> dict[str, int]:
    for key in _SIZES:
        if key not in config:
            raise InputError(f"{where} lacks {key}; save the model again by save_pretrained")
    sizes = {key: whole(where, key, config[key], 1, _MOST[key]) for key in _SIZES}
    heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
    defaults = {"num_key_value_heads": heads, "max_position_embeddings": 2048}
    for key, default in defaults.items():
        value = config.get(key)
        sizes[key] = whole(where, key, default if value is None else value, 1, _MOST[key])
    if hidden % heads:
        raise InputError(f"{where}: hidden_size {hidden} is not divisible by num_attention_heads {heads}")
    if heads % sizes["num_key_value_heads"]:
        raise InputError(
            f"{where}: num_attention_heads {heads} is not divisible by num_key_value_heads {sizes['num_key_value_heads']}"
        )
    width = config.get("head_dim")
    sizes["head_dim"] = whole(where, "head_dim", hidden // heads if width is None else width, 1, _MOST["head_dim"])
    if sizes["head_dim"] % 2:
        raise InputError(
            f"{where}: a head has {sizes['head_dim']} features, and the rotary embedding turns pairs of them"
        )
    return sizes


def _token(where: str, key: str, value: object, vocabulary: int) -> int | None:
    """Return the id of a token, None where there is none."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocabulary:
        raise InputError(
            f"{where}: {key} is {show(value)}, which is no token: the vocabulary has ids 0 to {vocabulary - 1}"
        )
    return value


def _tokens(where: str, key: str, value: object, vocabulary: int) -> list[int]:
    """Return the ids of a token or of a list of tokens, none for null."""
    ids = [_token(where, key, each, vocabulary) for each in (value if isinstance(value, list) else [value])]
    return [each for each in ids if each is not None]
