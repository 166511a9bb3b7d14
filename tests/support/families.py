"""Tiny random checkpoints, one per family and per variant of it, with weights that are not tiny so that errors show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
import transformers
from transformers import PreTrainedModel

from hecompile.checkpoint.families import FAMILIES
from hecompile.compiler.frontend import export_onnx, load_checkpoint
from tests.support.training import make_tokenizer

_COMMON: dict[str, Any] = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "attn_implementation": "eager", "initializer_range": 0.2,
}  # fmt: skip
_GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64, "n_inner": 48}
_CAPPED = {"head_dim": 16, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
_TWO = {"num_hidden_layers": 2}
_FACTORS = {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 4.0, 6.0, 8.0]}


@dataclass(frozen=True)
class Variant:
    """A family with settings beside those that all have; `without`: the common ones that it does not know."""

    family: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()

    def make(self) -> PreTrainedModel:
        """Every value is random: norms and biases too, which transformers begins with at 1 and 0."""
        family = FAMILIES[self.family]
        known = {key: value for key, value in _COMMON.items() if key not in self.without}
        config = getattr(transformers, family.configuration)(**{**known, **self.settings})
        torch.manual_seed(0)
        model = getattr(transformers, family.model)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.3 * torch.randn(parameter.shape))
        return model.eval()


def _rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 100.0, **settings}}


ORIGINAL = 32
"""Positions up to which the variants with longrope turn by their short factors."""
BASIC: dict[str, Variant] = {
    "llama": Variant("llama", _TWO),
    "mistral": Variant("mistral", {"sliding_window": 4, "head_dim": 8}),
    "qwen2": Variant("qwen2"),
    "qwen3": Variant("qwen3", {"head_dim": 16}),
    "gemma": Variant("gemma", {"head_dim": 16}),
    "gemma2": Variant("gemma2", {**_CAPPED, **_TWO, "sliding_window": 4}),
    "gemma3_text": Variant(
        "gemma3_text",
        {**_TWO, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 4,
         "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": Variant("phi3", {"partial_rotary_factor": 0.5, "sliding_window": 4, "original_max_position_embeddings": 64}),
    "olmo2": Variant("olmo2"),
    "granite": Variant(
        "granite",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2, "logits_scaling": 0.5},
    ),
    "smollm3": Variant("smollm3", {**_TWO, "no_rope_layers": [1, 0]}),
    "gpt2": Variant(
        "gpt2", _GPT2,
        without=("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                 "max_position_embeddings"),
    ),
    "gpt_neox": Variant("gpt_neox", {"rotary_pct": 0.5}, without=("num_key_value_heads",)),
    "mixtral": Variant("mixtral", {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": Variant(
        "qwen3_moe", {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    ),
}  # fmt: skip
"""One of each family."""
FURTHER: dict[str, Variant] = {
    "llama biases, gelu, linear rope": Variant(
        "llama",
        {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu", "tie_word_embeddings": True,
         **_rope("linear", factor=2.0)},
    ),
    "llama longrope": Variant(
        "llama", _rope("longrope", original_max_position_embeddings=ORIGINAL, factor=2.0, **_FACTORS)
    ),
    "mistral without a window, dynamic rope": Variant(
        "mistral", {"sliding_window": None, **_rope("dynamic", factor=2.0)}
    ),
    "qwen2 windows from the second layer, yarn": Variant(
        "qwen2",
        {**_TWO, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1,
         **_rope("yarn", factor=2.0, original_max_position_embeddings=32, beta_fast=16.0)},
    ),
    "gemma3 two ropes": Variant(
        "gemma3_text",
        {"head_dim": 16, "query_pre_attn_scalar": 1, "sliding_window": 4, **_TWO,
         "sliding_window_pattern": 2, "final_logit_softcapping": 3.0,
         "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}},
    ),
    "phi3 longrope": Variant(
        "phi3",
        {"original_max_position_embeddings": ORIGINAL, "tie_word_embeddings": True,
         "rope_parameters": {"rope_type": "longrope", "rope_theta": 100.0, **_FACTORS}},
    ),
    "olmo2 bias, llama3 rope": Variant(
        "olmo2",
        {"attention_bias": True, **_rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                         original_max_position_embeddings=32)},
    ),
    "granite without multipliers": Variant("granite", {"attention_multiplier": 1.0}),
    "qwen3_moe normed": Variant(
        "qwen3_moe",
        {"head_dim": 16, "num_experts": 3, "num_experts_per_tok": 1, "moe_intermediate_size": 24, "norm_topk_prob": True,
         "use_sliding_window": True, "sliding_window": 4},
    ),
    "gpt2 narrow relu": Variant(
        "gpt2", {**_GPT2, "n_inner": None, "activation_function": "relu"}, without=BASIC["gpt2"].without
    ),
    "gpt_neox sequential": Variant(
        "gpt_neox", {"use_parallel_residual": False, "rotary_pct": 1.0, "hidden_act": "gelu_fast"},
        without=("num_key_value_heads",),
    ),
}  # fmt: skip
"""What the families may set besides."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder, the model that was saved there, and the export of what was loaded from it."""

    directory: Path
    model: PreTrainedModel
    proto: onnx.ModelProto

    def exported(self) -> ir.Model:
        """A copy, for passes to change."""
        return ir.from_proto(self.proto)


@cache
def checkpoint(name: str, root: Path) -> Checkpoint:
    """Save, load and export the variant `name` in a folder under `root`, once."""
    directory = root / name.replace(" ", "-")
    model = (BASIC | FURTHER)[name].make()
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return Checkpoint(directory, model, ir.to_proto(export_onnx(load_checkpoint(str(directory)).model)))
