"""A random two-layer Llama, a byte tokenizer and a small dataset, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hecompile.runtime.model.plaintext import PlaintextPeftModel
from hecompile.runtime.recipes.training import Recipe

BUCKETS = (16, 32)
SECRET = "marzipan"
"""A word of the dataset that must not turn up in any message, metric or log."""
RECORDS = [
    {"prompt": f"ask {i}:", "completion": f" {SECRET} {'x' * (i % 4)}{i}"} for i in range(10)
]  # 15 to 26 tokens each with bos and eos


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte; pad, bos and eos are 0, 1 and 2; bos is put first, as Llama does."""
    specials = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*specials, *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def make_base(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, attn_implementation="eager",
        pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def make_model(dropout: float = 0.0, seed: int = 0, **options: Any) -> PlaintextPeftModel:
    """A PlaintextPeftModel whose A and B are both non-zero."""
    config = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    limits: dict[str, Any] = {"sequence_buckets": BUCKETS, "batch_size": 4} | options
    model = PlaintextPeftModel(make_base(seed), config, **limits)
    generator = torch.Generator().manual_seed(seed + 1)
    shapes = {key: value.shape for key, value in model.adapter_state().items()}
    model.load_adapter_state({key: 0.1 * torch.randn(shape, generator=generator) for key, shape in shapes.items()})
    return model


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def make_recipe(directory: Path, **training: Any) -> Recipe:
    """A recipe over RECORDS with its output in directory/run; the validation file is the first four of them."""
    settings = {
        "output_dir": directory / "run", "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 5e-3,
        "warmup_steps": 2, "disable_tqdm": True, "save_steps": 3,
    }  # fmt: skip
    return Recipe.model_validate(
        {
            "model": directory / "client",
            "worker_bundle": directory / "worker",
            "data": {
                "train_file": write_jsonl(directory / "train.jsonl", RECORDS),
                "validation_file": write_jsonl(directory / "heldout.jsonl", RECORDS[:4]),
            },
            "training": settings | training,
        }
    )
