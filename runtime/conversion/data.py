"""Read the public text of a conversion as rows of one length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hecompile.errors import InputError
from hecompile.runtime.conversion.recipe import ConversionData
from hecompile.runtime.model.data import load_examples

_UNLIMITED = 1 << 20


def load_rows(data: ConversionData, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Return training rows and held-out rows, int64 [N, length] each.

    Texts with bos and eos follow each other and are cut into rows; an incomplete last row is dropped.
    Raises InputError for a file that cannot be read, or for less text than one row.
    """
    train, heldout = (_rows(path, data.length, tokenizer) for path in (data.train_file, data.validation_file))
    return train, heldout


def _rows(path: Path, length: int, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    if not path.exists():
        path = path.resolve()  # without the `..` of a recipe's own path
        raise InputError(
            f"there is no text {path}. The project's public corpus is written by `python -m "
            f"hecompile.models.worlds.public_world {path.parent} --documents N`; the first lines of a recipe in "
            "models/recipes have its N"
        )
    examples = load_examples(path, tokenizer, (_UNLIMITED,)).examples
    stream = np.concatenate([np.asarray(example.input_ids, dtype=np.int64) for example in examples])
    if len(stream) < length:
        raise InputError(f"the text {path} is shorter than one row of {length} tokens; give more, or lower data.length")
    return torch.from_numpy(stream[: len(stream) // length * length].reshape(-1, length))


def batch_of(rows: Tensor, step: int, batch_size: int, seed: int) -> Tensor:
    """Return the rows [batch, length] of a step, which depend on the arguments alone: a resumed run is the same run."""
    size = min(batch_size, len(rows))
    epoch, index = divmod(step, len(rows) // size)
    order = np.random.default_rng([seed, epoch]).permutation(len(rows))
    return rows[torch.from_numpy(order[index * size : (index + 1) * size])]
