"""Make checkpoints of the shapes of Llama-3.2-1B and Llama-3.1-8B with random weights, saved and loaded as real ones are.

    python benchmarks/training/checkpoints.py DIR [--layers 16] [--shape 8b]

Speed, memory and bytes depend on the shape and not on what the weights say. The tokenizer is the small Llama's: 1024 of
the 128256 tokens have a text, and none of the figures depends on which.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hecompile.models import TINY_LLAMA


def llama_1b_config(layers: int = 16) -> LlamaConfig:
    """Return the configuration of meta-llama/Llama-3.2-1B, with the special tokens of the small Llama's tokenizer."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        initializer_range=0.02,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def llama_8b_config(layers: int = 32) -> LlamaConfig:
    """Return the configuration of meta-llama/Llama-3.1-8B, with the special tokens of the small Llama's tokenizer."""
    config = llama_1b_config(layers)
    config.hidden_size, config.intermediate_size, config.head_dim = 4096, 14336, 128
    config.tie_word_embeddings = False
    config.rope_parameters = {**(config.rope_parameters or {}), "factor": 8.0}
    return config


SHAPES = {"1b": llama_1b_config, "8b": llama_8b_config}


def make_checkpoint(directory: Path, layers: int = 16, seed: int = 0, shape: str = "1b") -> Path:
    """Save a random model of a shape in bfloat16, and a tokenizer beside it; returns `directory`.

    The initialisation is Hugging Face's: normal weights of standard deviation 0.02, unit norms. The folder takes 2.5 GB at
    16 layers, 0.8 GB at 2; at the 8B shape 2.1 GB and 0.44 GB for each layer.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(SHAPES[shape](layers))
    finally:
        torch.set_default_dtype(dtype)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(TINY_LLAMA).save_pretrained(directory)
    return Path(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    options = parser.parse_args()
    print(make_checkpoint(options.directory, options.layers, options.seed, options.shape))


if __name__ == "__main__":
    main()
