"""Open a GGUF file of a Llama as a checkpoint's folder: its configuration and tokenizer in Hugging Face's files.

A GGUF file holds what a folder of transformers does, in keys of its own. Those that decide the computation are translated
here, one by one, into a config.json, which is then checked as any other; a key of the Llama that is not known is refused.
transformers translates the tokenizer.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hecompile.checkpoint.folder import CONFIG, GENERATION_CONFIG
from hecompile.checkpoint.formats.gguf_header import GgufHeader, Value
from hecompile.checkpoint.formats.gguf_tensors import ROTARY_FACTORS, read_entry
from hecompile.checkpoint.place import is_gguf
from hecompile.checkpoint.values import show
from hecompile.errors import InputError

_ARCHITECTURE = "general.architecture"
_TRANSLATED = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
"""Keys under `llama.`, and what each is in config.json."""
_READ_ELSEWHERE = {"rope.dimension_count", "attention.value_length", "rope.scaling.type", "rope.scaling.factor"}
_NOT_USED = {"expert_count": 0, "expert_used_count": 0}
"""Keys that may be there with this value."""
_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
"""Keys under `tokenizer.ggml.`, and what each is in config.json."""
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The settings of every Llama 3.1 and later, from which llama.cpp computes the divisors that its files hold."""


@contextmanager
def opened(path: Path, tokenizer: bool = True) -> Iterator[Path]:
    """Open a checkpoint: give its folder, for a GGUF file one that is made for as long.

    tokenizer: whether the tokenizer is wanted too. Raises InputError naming the file and the key where it cannot be read.
    """
    if not is_gguf(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="hecompile-gguf-") as made:
        folder = Path(made)
        try:
            _write(GgufHeader.read(path), folder, tokenizer)
            yield folder
        except InputError as error:  # of a file that is there as long as this: name the one that it was made of
            raise InputError(str(error).replace(str(folder), str(path))) from error


def _write(header: GgufHeader, folder: Path, tokenizer: bool) -> None:
    config = configuration_of(header)
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    ends = [header.values.get(f"tokenizer.ggml.{key}") for key in ("eos_token_id", "eot_token_id")]
    known = {"eos_token_id": list(dict.fromkeys(end for end in ends if end is not None))}
    (folder / GENERATION_CONFIG).write_text(json.dumps(known), encoding="utf-8")
    if tokenizer:
        _write_tokenizer(header, folder)


def configuration_of(header: GgufHeader) -> dict[str, Any]:
    """Return the config.json that a file's keys mean. Raises InputError for a key that is not computed."""
    kind = header.values.get(_ARCHITECTURE)
    if kind != "llama":
        raise InputError(
            f"{header.path}: {_ARCHITECTURE} is {show(kind)}; supported in GGUF files: llama. Export the model's safetensors"
        )
    own = {key.removeprefix("llama."): value for key, value in header.values.items() if key.startswith("llama.")}
    own = {key: value for key, value in own.items() if _NOT_USED.get(key) != value}
    if unknown := sorted(own.keys() - _TRANSLATED.keys() - _READ_ELSEWHERE):
        raise InputError(f"{header.path}: llama.{unknown[0]} is {show(own[unknown[0]])}, which is not computed")
    config: dict[str, Any] = {new: own[old] for old, new in _TRANSLATED.items() if old in own}
    config.setdefault("vocab_size", header.counts.get("tokenizer.ggml.tokens", 0))
    for key, name in _TOKENS.items():
        config[name] = header.values.get(f"tokenizer.ggml.{key}")
    tied = all(entry.name != "output.weight" for entry in header.tensors)
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": tied}
    width = config.get("head_dim") or _quotient(config.get("hidden_size"), config.get("num_attention_heads"))
    for key in ("rope.dimension_count", "attention.value_length"):
        if own.get(key, width) != width:
            raise InputError(f"{header.path}: llama.{key} is {show(own[key])}; supported: a head's {width} features")
    return config | _rope(header, own, config, width)


def _quotient(hidden: object, heads: object) -> int:
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 else 0


def _rope(header: GgufHeader, own: dict[str, Value], config: dict[str, Any], width: int) -> dict[str, Any]:
    """Return the scaling of the rotary embedding: by keys, or by the divisors that files of Llama 3 hold."""
    kind = own.get("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise InputError(
            f"{header.path}: llama.rope.scaling.type is {show(kind)}; supported in GGUF files: none, linear. Export the "
            "model's safetensors"
        )
    if kind != "none":
        return {"rope_scaling": {"rope_type": kind, "factor": own.get("rope.scaling.factor")}}
    divisors = read_entry(header, ROTARY_FACTORS)
    if divisors is None:
        return {}
    scaling = {"rope_type": "llama3", "factor": float(divisors.max()), **_LLAMA3}
    if not _are_of_llama3(divisors, scaling, config, width):
        raise InputError(
            f"{header.path}: {ROTARY_FACTORS} scales the rotary embedding in another way than Llama 3 does"
        )
    return {"rope_scaling": scaling}


def _are_of_llama3(divisors: torch.Tensor, scaling: dict[str, Any], config: dict[str, Any], width: int) -> bool:
    theta = config.get("rope_theta")
    if not isinstance(theta, float) or theta <= 0 or type(width) is not int or not scaling["factor"] >= 1:
        return False
    if divisors.shape != (width // 2,):
        return False
    rope = {"rope_theta": theta, **scaling}
    settings = LlamaConfig(head_dim=width, hidden_size=width, num_attention_heads=1, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](settings, torch.device("cpu"))
    plain = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    return bool(torch.allclose(plain / scaled, divisors, rtol=1e-3))


def _write_tokenizer(header: GgufHeader, folder: Path) -> None:
    """Let transformers translate the tokenizer, in a folder that has the GGUF file and nothing else."""
    with tempfile.TemporaryDirectory(prefix="hecompile-gguf-") as alone:
        (Path(alone) / "model.gguf").symlink_to(header.path.resolve())
        try:
            made = PreTrainedTokenizerFast.from_pretrained(alone, gguf_file="model.gguf", local_files_only=True)
            _without_others(made, header.counts.get("tokenizer.ggml.tokens", 0)).save_pretrained(folder)
        except Exception as error:  # tokenizers raises many kinds for keys that do not belong together
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"cannot load the tokenizer of {header.path}: {reason[:200]}") from error


def _without_others(tokenizer: Any, count: int) -> Any:
    """Leave out tokens that transformers adds to the `count` of the file, as GPT-2's end of a text to any of its kind.

    The model has no embedding for them.
    """
    added = {token for token, number in tokenizer.get_vocab().items() if number >= count}
    if not added:
        return tokenizer
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in added]
    if state["model"].get("unk_token") in added:
        state["model"]["unk_token"] = None
    roles = ("bos_token", "eos_token", "unk_token", "pad_token")
    kept = {role: getattr(tokenizer, role) for role in roles if getattr(tokenizer, role) not in added}
    backend = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=tokenizer.chat_template, **kept)
