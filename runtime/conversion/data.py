"""Public text for a conversion, as rows of one length."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hecompile.errors import InputError
from hecompile.runtime.conversion.recipe import ConversionData
from hecompile.runtime.model.data import eos_and_pad, load_examples

_UNLIMITED = 1 << 20


def load_rows(data: ConversionData, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """(training rows, held-out rows), int64 [N, length] each: texts with bos and eos one after the other, cut into rows;
    what is left over is dropped.

    Raises InputError for a file that cannot be read, or for less text than one row.
    """
    if data.generated_documents is not None:
        from hecompile.models.worlds.public_world import documents

        eos = eos_and_pad(tokenizer)[0]
        texts = documents(data.generated_documents, data.seed)
        seen = set(texts)
        heldout = [text for text in documents(data.generated_heldout, data.seed, heldout=True) if text not in seen]
        parts = [[[*ids, eos] for ids in tokenizer(found, verbose=False)["input_ids"]] for found in (texts, heldout)]
    else:
        assert data.train_file is not None and data.validation_file is not None  # the recipe was validated
        examples = [load_examples(path, tokenizer, (_UNLIMITED,)) for path in (data.train_file, data.validation_file)]
        parts = [[list(example.input_ids) for example in found.examples] for found in examples]
    train, rest = (_rows(part, data.length) for part in parts)
    for name, rows in (("training", train), ("held-out", rest)):
        if len(rows) == 0:
            raise InputError(
                f"the {name} text is shorter than one row of {data.length} tokens; give more, or lower data.length"
            )
    return train, rest


def _rows(texts: list[list[int]], length: int) -> Tensor:
    stream = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in texts])
    return torch.from_numpy(stream[: len(stream) // length * length].reshape(-1, length))


def batch_of(rows: Tensor, step: int, batch_size: int, seed: int) -> Tensor:
    """The rows [batch, length] of a step: it depends on nothing else, so that a resumed run is the same run."""
    size = min(batch_size, len(rows))
    epoch, index = divmod(step, len(rows) // size)
    order = np.random.default_rng([seed, epoch]).permutation(len(rows))
    return rows[torch.from_numpy(order[index * size : (index + 1) * size])]
