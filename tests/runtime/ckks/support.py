"""Small parameters, keys made once, and a Llama of one layer that is evaluated in seconds."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM

from hecompile.ckks.evaluator import CkksTensor, Evaluator
from hecompile.ckks.keys import SecretKey
from hecompile.ckks.parameters import CkksLiteral, CkksParameters
from hecompile.compiler.ckks import CkksOptions
from hecompile.compiler.polynomial_options import CONFIG_KEY
from tests.support.training import make_tokenizer

LEVELS = 4
OPTIONS = CkksOptions(3, levels=LEVELS)


@cache
def parameters() -> CkksParameters:
    return CkksLiteral(8192, LEVELS).validate()


@cache
def key() -> SecretKey:
    return SecretKey(parameters())


@cache
def evaluator() -> Evaluator:
    return Evaluator(key().evaluation_keys(), threads=2)


def encrypted(values: NDArray[np.float64]) -> CkksTensor:
    """Encrypt values [*shape, batch] into a tensor of ciphertexts of `shape`."""
    shape = values.shape[:-1]
    words = key().encrypt(np.ascontiguousarray(values.reshape(-1, values.shape[-1])))
    return CkksTensor(words, np.arange(len(words)).reshape(shape), LEVELS)


def decrypted(tensor: CkksTensor, batch: int) -> NDArray[np.float64]:
    """[*shape, batch]; entries that are known to be zero are 0."""
    last = evaluator().truncated(tensor)
    values = key().decrypt(last.words, tensor.level)[:, :batch]
    found = np.where((last.index >= 0)[..., None], values[np.maximum(last.index, 0)], 0.0)
    return np.asarray(found)


def small_llama(directory: Path) -> Path:
    """Save a checkpoint of one layer, hidden size 8, with coarse polynomials: few levels, little error magnified."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=259, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, initializer_range=0.4,
    )  # fmt: skip
    attention = {"variant": "gaussian_kernel", "error": 0.05}
    setattr(config, CONFIG_KEY, {"attention": attention, "norm": {"error": 0.02}, "activation": {"error": 0.05}})
    LlamaForCausalLM(config).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory
