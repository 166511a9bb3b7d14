"""Load a tokenizer from a folder without running or fetching what its files name; keep what ends an answer beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from hecompile.checkpoint.folder import GENERATION_CONFIG, TOKENIZER_CONFIG, check_links, read_object, refuse_code
from hecompile.checkpoint.values import show
from hecompile.errors import InputError


def load_tokenizer(directory: Path, config: PretrainedConfig | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer in `directory`. Raises InputError where there is none, or where its files lead elsewhere.

    config: of the model that it belongs to, None where the folder holds a tokenizer alone.
    """
    check_links(directory)
    _check_settings(directory / TOKENIZER_CONFIG)
    options: dict[str, Any] = {} if config is None else {"config": config}
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(directory), trust_remote_code=False, local_files_only=True, **options
        )
        len(tokenizer)  # some kinds notice only here that they have no vocabulary
    except Exception as error:  # tokenizers raises many kinds for a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"cannot load the tokenizer of {directory}: {reason[:200]}") from error
    return tokenizer


def check_vocabulary(where: str | Path, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Refuse a tokenizer with tokens that the model has no embedding for. Raises InputError naming both sizes."""
    ids = tokenizer.get_vocab()
    if not ids:
        raise InputError(f"cannot load the tokenizer of {where}: it has no tokens")
    token = max(ids, key=lambda each: ids[each])
    if (size := ids[token] + 1) > vocabulary:
        raise InputError(
            f"the tokenizer of {where} has ids for {size} tokens, the model an embedding for {vocabulary} (vocab_size): "
            f"{show(token)} has none. Call resize_token_embeddings, train what is new, and save both again"
        )


def write_answer_ends(directory: Path, ids: Iterable[int]) -> None:
    """Write the ids of the tokens that end an answer beside a tokenizer, in the file that Hugging Face has for them."""
    text = json.dumps({"eos_token_id": sorted(ids)}) + "\n"
    (directory / GENERATION_CONFIG).write_text(text, encoding="utf-8")


def read_answer_ends(directory: Path) -> frozenset[int]:
    """Return what `write_answer_ends` wrote, nothing for an older export. Raises InputError for other content."""
    path = directory / GENERATION_CONFIG
    if not path.is_file():
        return frozenset()
    ids = read_object(path).get("eos_token_id")
    if not isinstance(ids, list) or not all(type(each) is int and each >= 0 for each in ids):
        raise InputError(f"{path}: eos_token_id must be a list of ids, got {show(ids)}; export again")
    return frozenset(ids)


def _check_settings(path: Path) -> None:
    if not path.is_file():
        return
    settings = read_object(path)
    refuse_code(path, settings)
    for key, value in settings.items():
        # transformers would open it in place of the file in the folder.
        if key.endswith("_file") and value is not None and (not isinstance(value, str) or Path(value).name != value):
            raise InputError(f"{path}: {key} is {show(value)}, outside of its folder; delete the key")
