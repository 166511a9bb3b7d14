"""Load a model from a checkpoint's folder: configuration, tokenizer and weights, each read by what is in its file alone.

transformers gets values and never the folder: given a folder it would attach an adapter, read defaults of generation, look
up the hub, and open pickles where there are no safetensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hecompile.checkpoint.configuration import family_of, read_answer_ends, read_configuration
from hecompile.checkpoint.folder import check_folder
from hecompile.checkpoint.gguf import opened
from hecompile.checkpoint.tokenizer import check_vocabulary, load_tokenizer
from hecompile.checkpoint.weights import HEAD, Weights, empty_model, find_weights, read_weights
from hecompile.environment import without_launcher
from hecompile.errors import InputError


def load_configuration(directory: Path) -> PretrainedConfig:
    """Read and check the configuration of the checkpoint in `directory`, or of a GGUF file.

    Raises InputError for what is not supported.
    """
    with opened(directory, tokenizer=False) as folder:
        check_folder(folder)
        config = read_configuration(folder)
        read_answer_ends(folder, config)
        return config


def load_model(
    directory: Path, attention: Literal["eager", "sdpa"] = "eager"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the checkpoint in `directory`, or a GGUF file, in float32, and its tokenizer.

    Raises InputError naming what is wrong. Everything that can be refused without the weights is refused before they are
    read. The model's generation_config has the ids of bos, eos and padding, and nothing else: `answer_ends` reads them.
    """
    config, tokenizer, ends = _load_words(directory)
    return _model(directory, config, ends, read_weights(directory, config), attention), tokenizer


def load_hollow(directory: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Weights]:
    """Load a checkpoint as `load_model` does, but with zeros that take no memory in the place of weights.

    Raises InputError as `load_model` does, but for values, which are looked at when `Weights` reads them.
    """
    config, tokenizer, ends = _load_words(directory)
    weights = find_weights(directory, config)
    zeros = {name: torch.zeros(()).expand(value.shape) for name, value in empty_model(config).state_dict().items()}
    if config.tie_word_embeddings:
        zeros.pop(HEAD, None)
    return _model(directory, config, ends, zeros, "eager"), tokenizer, weights


def _load_words(directory: Path) -> tuple[PretrainedConfig, PreTrainedTokenizerBase, tuple[int, ...]]:
    """Load all but the weights: the configuration, the tokenizer, and the ids of the tokens that end an answer."""
    with opened(directory) as folder:
        config = load_configuration(folder)
        ends = read_answer_ends(folder, config)
        tokenizer = load_tokenizer(folder, config)
        check_vocabulary(directory, tokenizer, config.vocab_size)
    return config, tokenizer, tuple(ends)


def _model(
    directory: Path, config: PretrainedConfig, ends: tuple[int, ...], weights: dict[str, Tensor], attention: str
) -> PreTrainedModel:
    kind: Any = getattr(transformers, family_of(config).model)
    try:
        with without_launcher():
            model: Any = kind.from_pretrained(
                None, config=config, state_dict=weights, dtype=torch.float32, attn_implementation=attention,
                experts_implementation="eager",  # the default takes no widths but multiples of four
            )
    except Exception as error:  # whatever transformers finds in weights that have the right names and shapes
        raise InputError(f"cannot load the weights of {directory}: {' '.join(str(error).split())}") from error
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, pad_token_id=config.pad_token_id,
        eos_token_id=ends[0] if len(ends) == 1 else list(ends) or None,
    )  # fmt: skip
    loaded: PreTrainedModel = model.eval()
    return loaded


def answer_ends(model: Any) -> frozenset[int]:
    """Return the ids of the tokens that end an answer of a transformers model, by its generation_config."""
    ids = model.generation_config.eos_token_id
    return frozenset(ids if isinstance(ids, list) else [] if ids is None else [ids])
