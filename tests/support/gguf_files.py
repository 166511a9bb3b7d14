"""Write the tiny Llama into a GGUF file, as llama.cpp's converter does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from torch import Tensor
from transformers import LlamaForCausalLM

from tests.support.training import make_tokenizer

_INSIDE = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

Kind = gguf.GGMLQuantizationType


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of a tensor of LlamaForCausalLM."""
    module, _, suffix = name.rpartition(".")
    if module in _OUTSIDE:
        return f"{_OUTSIDE[module]}.{suffix}"
    layer, _, inside = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_INSIDE[inside]}.{suffix}"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Order the rows of q_proj or k_proj as llama.cpp does: features that turn together beside each other."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    kind: Callable[[str], Kind] = lambda name: Kind.F32,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a model with the tests' tokenizer.

    kind: of each tensor's numbers, by its name in LlamaForCausalLM. keys: written besides, or in place of the model's; None
    for one that is left out. tensors: written besides, under their own names.
    """
    config = model.config
    rope = config.rope_parameters["rope_theta"]
    values: dict[str, Any] = {
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "llama.rope.freq_base": float(rope),
        "llama.rope.dimension_count": config.head_dim,
        "llama.vocab_size": config.vocab_size,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        **(keys or {}),
    }
    writer = gguf.GGUFWriter(path, values.pop("general.architecture", "llama"))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    vocabulary = make_tokenizer().get_vocab()
    writer.add_token_list(sorted(vocabulary, key=lambda token: vocabulary[token]))
    writer.add_token_types([3] * 3 + [1] * (len(vocabulary) - 3))
    writer.add_token_scores([0.0] * len(vocabulary))  # from which transformers makes merges, none here
    for key, value in values.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if value is not None:
            add[type(value)](key, value)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    state = model.state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    for name, value in state.items():
        array = value.float().numpy()
        module = name.split(".")[-2]
        array = interleaved(array, heads[module]) if module in heads else array
        writer.add_tensor(gguf_name(name), gguf.quantize(array, kind(name)), raw_dtype=kind(name))
    for name, value in (tensors or {}).items():
        writer.add_tensor(name, value.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
