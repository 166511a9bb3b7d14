"""Read the text that a plan is calibrated on from a file, where the model is not to write it itself.

The weights that a worker gets are rounded for this text, and ranges in the plan are of it: it must be public.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hecompile.errors import InputError
from hecompile.files import missing_path_hint, reason_of
from hecompile.foreign import parse_json
from hecompile.passes.approximation.calibrate import Samples

SEQUENCES = 8
"""Sequences that are taken of a file at most."""
_LONGEST_TOKEN = 64
"""Characters of a token, generously: so many for each token that is wanted are enough."""


def read_samples(path: Path, tokenizer: PreTrainedTokenizerBase, length: int) -> Samples:
    """Return up to SEQUENCES sequences of `length` tokens, each with the beginning of the tokenizer's texts.

    The file has a text on each line, or, named .jsonl, objects with `text` or with `prompt` and `completion`. Texts follow
    each other, with the end-of-text token between them. Raises InputError, naming file and line, for a file that cannot be
    read, is of another form or has less than one sequence.
    """
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    start = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    stream: list[int] = []
    width = length - len(start)
    for text in _texts(path):
        begun = text[: SEQUENCES * width * _LONGEST_TOKEN]  # a line of megabytes would be tokenised for nothing
        stream += [*tokenizer(begun, add_special_tokens=False)["input_ids"], *end]
        if len(stream) >= SEQUENCES * width:
            break
    count = min(SEQUENCES, len(stream) // width)
    if count == 0:
        raise InputError(f"{path} has {len(stream)} tokens; calibration needs at least {width}: give it more text")
    return tuple((*start, *stream[at * width : (at + 1) * width]) for at in range(count))


def _texts(path: Path) -> Iterator[str]:
    for number, line in enumerate(_content(path).split("\n"), start=1):  # a text may hold U+2028, where splitlines cuts
        if line.strip():
            yield _text_of(line, f"{path}, line {number}") if path.suffix == ".jsonl" else line


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        if (missing := missing_path_hint(path)) is not None:
            raise InputError(f"the calibration text {missing}") from None
        raise InputError(f"cannot read the calibration text {path}: {reason_of(error)}") from None


def _text_of(line: str, where: str) -> str:
    try:
        value = parse_json(line)
    except ValueError:
        raise InputError(f"{where}: not valid JSON") from None
    keys = ("text",) if isinstance(value, dict) and "text" in value else ("prompt", "completion")
    if not isinstance(value, dict) or not all(isinstance(value.get(key), str) for key in keys):
        raise InputError(f"{where}: wanted is an object with the string text, or with prompt and completion")
    text = "".join(value[key] for key in keys)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: its text has half a character (\\ud800 to \\udfff alone); write the whole one") from None
    return text
