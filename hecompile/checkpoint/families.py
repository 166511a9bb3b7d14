"""Keep the table of the model families that are read: what each is called, computes and is made of.

A family is what transformers computes for one `model_type`. Adding one is an entry here and a checkpoint in
`tests/support/families.py`: docs/models.md says how.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hecompile.checkpoint.values import Choice, Flag, Number, Rule, Whole

_ACTIVATION = Choice(("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu"))
ROPE = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
"""Every type of rotary embedding that is computed."""
_SIZES: dict[str, Rule] = {
    "vocab_size": Whole(2**24), "hidden_size": Whole(2**20), "intermediate_size": Whole(2**22),
    "num_hidden_layers": Whole(4096), "num_attention_heads": Whole(2**16), "max_position_embeddings": Whole(2**31, False),
}  # fmt: skip
"""Sizes beyond every model there is are refused: a mistake in a file must not become a wait or a lack of memory."""
_GROUPED: dict[str, Rule] = {
    **_SIZES, "num_key_value_heads": Whole(2**16, False, nullable=True), "rms_norm_eps": Number(),
    "tie_word_embeddings": Flag(), "hidden_act": _ACTIVATION,
}  # fmt: skip
_HEAD: dict[str, Rule] = {"head_dim": Whole(2**16, False, nullable=True)}
_WINDOW = Whole(2**31, False, nullable=True)
_SOME_WINDOWS: dict[str, Rule] = {"use_sliding_window": Flag(), "sliding_window": _WINDOW}
_GEMMA: dict[str, Rule] = {
    **{key: rule for key, rule in _GROUPED.items() if key != "hidden_act"}, **_HEAD,
    "hidden_activation": _ACTIVATION, "attention_bias": Flag(), "query_pre_attn_scalar": Number(),
    "sliding_window": Whole(2**31, False), "final_logit_softcapping": Number(nullable=True),
    "attn_logit_softcapping": Number(nullable=True),
}  # fmt: skip


@dataclass(frozen=True)
class Experts:
    """Say what files call the experts that transformers keeps in `mlp.experts`: the block, and an expert's three linears."""

    block: str
    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class Family:
    """Describe the decoders of one `model_type`.

    Attributes:
        title: for people.
        model, configuration: names of the classes in transformers, of which no other code is ever run.
        products: names of the frozen linears of a block, as PEFT's `target_modules` has them; those that read one input
            stand together, for they become one product.
        settings: every key of config.json that decides what is computed, and what it may be.
        rope: types of rotary embeddings; none where positions are learned.
        partial: how much of a head is turned where the file does not say; None where it is always all of it.
        rope_keys: the family's own names of rope_theta and partial_rotary_factor. rope_aliases: older names of types.
        fixed: settings that are not taken from the file.
        own_code: what `auto_map` may name, since `model` computes the same.
        conv1d: whether linears keep their weights as [in, out], which PEFT calls fan_in_fan_out.
        experts: names of its experts in the files, each of which is two linears on the worker; None where it has none.
        polynomials: whether polynomials may stand for its attention, norm and activation.
    """

    model_type: str
    title: str
    model: str
    configuration: str
    products: tuple[tuple[str, ...], ...]
    settings: Mapping[str, Rule]
    rope: tuple[str, ...] = ROPE
    partial: float | None = None
    rope_keys: Mapping[str, str] = field(default_factory=dict)
    rope_aliases: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    own_code: tuple[str, ...] = ()
    conv1d: bool = False
    experts: Experts | None = None
    polynomials: bool = False

    @property
    def decoder(self) -> str:
        """Return the name of the class in transformers that is the model without its output head."""
        return self.configuration.replace("Config", "Model")

    @property
    def linears(self) -> tuple[str, ...]:
        """Return the names of the linears of a block, each of which an adapter may extend."""
        return tuple(name for product in self.products for name in product)


_SEPARATE = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
_GPT2_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_FAMILIES = (
    Family(
        "llama", "Llama 2, Llama 3, SmolLM2", "LlamaForCausalLM", "LlamaConfig", _SEPARATE,
        {**_GROUPED, **_HEAD, "attention_bias": Flag(), "mlp_bias": Flag()}, polynomials=True,
    ),
    Family("mistral", "Mistral", "MistralForCausalLM", "MistralConfig", _SEPARATE,
        {**_GROUPED, **_HEAD, "sliding_window": _WINDOW}),
    Family("qwen2", "Qwen2, Qwen2.5", "Qwen2ForCausalLM", "Qwen2Config", _SEPARATE,
        {**_GROUPED, **_SOME_WINDOWS, "max_window_layers": Whole(2**16, False, least=0)}),
    Family("qwen3", "Qwen3", "Qwen3ForCausalLM", "Qwen3Config", _SEPARATE,
        {**_GROUPED, "head_dim": Whole(2**16, False), **_SOME_WINDOWS, "attention_bias": Flag(),
         "max_window_layers": Whole(2**16, False, least=0)}),
    Family("gemma", "Gemma", "GemmaForCausalLM", "GemmaConfig", _SEPARATE,
        {**_GROUPED, "head_dim": Whole(2**16, False), "attention_bias": Flag()}),
    Family("gemma2", "Gemma 2", "Gemma2ForCausalLM", "Gemma2Config", _SEPARATE, _GEMMA),
    Family("gemma3_text", "Gemma 3 (text)", "Gemma3ForCausalLM", "Gemma3TextConfig", _SEPARATE,
        {**_GEMMA, "sliding_window_pattern": Whole(2**16, False)}),
    Family("phi3", "Phi-3, Phi-4", "Phi3ForCausalLM", "Phi3Config",
        (("qkv_proj",), ("o_proj",), ("gate_up_proj",), ("down_proj",)),
        {**_GROUPED, "original_max_position_embeddings": Whole(2**31, False), "sliding_window": _WINDOW},
        rope=("default", "longrope"), partial=1.0, rope_aliases={"su": "longrope", "yarn": "longrope"},
        fixed={"resid_pdrop": 0.0, "embd_pdrop": 0.0},
        own_code=("configuration_phi3.Phi3Config", "modeling_phi3.Phi3ForCausalLM", "Xenova/gpt-4o"),  # a tokenizer
    ),
    Family("olmo2", "OLMo 2", "Olmo2ForCausalLM", "Olmo2Config", _SEPARATE, {**_GROUPED, "attention_bias": Flag()}),
    Family("granite", "Granite 3", "GraniteForCausalLM", "GraniteConfig", _SEPARATE,
        {**_GROUPED, "attention_bias": Flag(), "mlp_bias": Flag(), "embedding_multiplier": Number(),
         "residual_multiplier": Number(), "attention_multiplier": Number(), "logits_scaling": Number()}),
    Family("smollm3", "SmolLM3", "SmolLM3ForCausalLM", "SmolLM3Config", _SEPARATE,
        {**_GROUPED, **_SOME_WINDOWS, "no_rope_layer_interval": Whole(2**16, False), "attention_bias": Flag(),
         "mlp_bias": Flag()}),
    Family("gpt2", "GPT-2", "GPT2LMHeadModel", "GPT2Config", (("c_attn",), ("c_proj",), ("c_fc",)),
        {"vocab_size": Whole(2**24), "n_positions": Whole(2**31, False), "n_embd": Whole(2**20), "n_layer": Whole(4096),
         "n_head": Whole(2**16), "n_inner": Whole(2**22, False, nullable=True), "activation_function": _ACTIVATION,
         "layer_norm_epsilon": Number(), "scale_attn_weights": Flag(), "tie_word_embeddings": Flag()},
        rope=(), fixed=_GPT2_DROPOUT, conv1d=True,
    ),
    Family("gpt_neox", "GPT-NeoX, Pythia", "GPTNeoXForCausalLM", "GPTNeoXConfig",
        (("query_key_value",), ("dense",), ("dense_h_to_4h",), ("dense_4h_to_h",)),
        {**_SIZES, "hidden_act": _ACTIVATION, "layer_norm_eps": Number(), "tie_word_embeddings": Flag(),
         "use_parallel_residual": Flag(), "attention_bias": Flag()},
        partial=0.25, rope_keys={"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
        fixed={"attention_dropout": 0.0, "hidden_dropout": 0.0},
    ),
    Family("mixtral", "Mixtral", "MixtralForCausalLM", "MixtralConfig", _SEPARATE[:2],
        {**_GROUPED, **_HEAD, "sliding_window": _WINDOW, "num_local_experts": Whole(2**12, False),
         "num_experts_per_tok": Whole(2**12, False)},
        experts=Experts("block_sparse_moe", "w1", "w3", "w2"),
    ),
    Family("qwen3_moe", "Qwen3 MoE", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", _SEPARATE[:2],
        {**_GROUPED, **_HEAD, **_SOME_WINDOWS, "attention_bias": Flag(), "moe_intermediate_size": Whole(2**22, False),
         "num_local_experts": Whole(2**12, False), "num_experts_per_tok": Whole(2**12, False), "norm_topk_prob": Flag()},
        experts=Experts("mlp", "gate_proj", "up_proj", "down_proj"),
    ),
)  # fmt: skip
FAMILIES: dict[str, Family] = {family.model_type: family for family in _FAMILIES}
"""The table, by `model_type`."""
LLAMA_LINEARS = FAMILIES["llama"].linears
SUPPORTED = ", ".join(FAMILIES)


def all_linears() -> tuple[str, ...]:
    """Return the names of the linears of all families, each once."""
    return tuple(dict.fromkeys(name for family in _FAMILIES for name in family.linears))
