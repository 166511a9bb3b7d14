"""Turn private text into token batches: JSONL with `prompt` and `completion`, or with `text`, one object per line.

`hecompile.runtime.model.tokens` says which ids a text has; eos ends each example. The loss is taken on the completion and
eos; of a `text` on all of it. No error shows any text.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from hecompile.errors import InputError
from hecompile.runtime.model.lines import parse_object, read_lines
from hecompile.runtime.model.tokens import TextEncoder

_NUMBERS = itertools.count()
_KEYS = ("prompt", "completion", "text")
IGNORED = -100
"""The label of a position that the loss leaves out; the value that transformers and torch's cross entropy use."""


@dataclass(frozen=True, eq=False)
class Example:
    """Hold one example: `input_ids` with eos at its end, of which the first `prompt_length` carry no loss.

    `prompt_length` is at least 1: the first token is predicted from nothing, so that it has no loss in any case.
    `has_prompt` tells whether it is a prompt that inference answers: neither none, nor white space, nor without a token.
    `number` tells it from every other example of this process, also from one of the same text.
    """

    input_ids: tuple[int, ...]
    prompt_length: int
    has_prompt: bool
    number: int = field(default_factory=_NUMBERS.__next__, compare=False)

    def __repr__(self) -> str:
        return f"Example({len(self.input_ids)} tokens, {self.prompt_length} of them prompt)"

    @property
    def labels(self) -> list[int]:
        """Return `input_ids` with `IGNORED` in place of the prompt."""
        return [IGNORED] * self.prompt_length + list(self.input_ids[self.prompt_length :])

    def matches(self, answer: Sequence[int], ends: Set[int] = frozenset()) -> bool:
        """Tell whether an answer is exactly the completion and then ends: the rule of evaluation and of inference.

        Tokens are compared, so that white space counts. An answer ends at the first eos or other token of `ends`: no answer
        is a completion with one in its midst, although what stands behind it can be predicted.
        """
        *completion, eos = self.input_ids[self.prompt_length :]
        stops = {eos, *ends}
        return list(answer[:-1]) == completion and answer[-1] in stops and stops.isdisjoint(completion)

    def item(self) -> dict[str, list[int]]:
        """Return the lists `input_ids` and `labels`, of equal length, as `PadToBucket` collates them."""
        return {"input_ids": list(self.input_ids), "labels": self.labels}

    def numbered_item(self) -> dict[str, list[int]]:
        """Return `item` with `number`, a list of one."""
        return {**self.item(), "number": [self.number]}


class Examples(Dataset[dict[str, list[int]]]):
    """Serve tokenised examples in file order, as the trainer's dataset."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = tuple(examples)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.examples[index].numbered_item()

    @property
    def longest(self) -> int:
        """Count the tokens of the longest example."""
        return max(self.lengths)

    @property
    def lengths(self) -> list[int]:
        """Count the tokens of each example."""
        return [len(example.input_ids) for example in self.examples]

    @property
    def digest(self) -> str:
        """Hash all examples, in order: SHA-256 in hex."""
        state = hashlib.sha256()
        for example in self.examples:
            state.update(repr((example.input_ids, example.prompt_length, example.has_prompt)).encode())
        return state.hexdigest()


@dataclass(frozen=True)
class PadToBucket:
    """Collate items of `Examples`: pad on the right to the smallest of `sequence_buckets` that holds the longest.

    Returns int64 tensors `input_ids`, `attention_mask` (0 on padding) and `labels` (`IGNORED` on padding), each [B, S], and
    `examples` [B], the numbers of the examples, where `with_examples` is set.
    """

    sequence_buckets: tuple[int, ...]
    pad_token_id: int
    with_examples: bool = False

    def __call__(self, items: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
        lengths = [len(item["input_ids"]) for item in items]
        width = smallest_bucket(max(lengths), self.sequence_buckets)
        shape = (len(items), width)  # [B, S]
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        labels = torch.full(shape, IGNORED, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        for row, (item, length) in enumerate(zip(items, lengths, strict=True)):
            input_ids[row, :length] = torch.tensor(item["input_ids"])
            labels[row, :length] = torch.tensor(item["labels"])
            attention_mask[row, :length] = 1
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        if self.with_examples:
            batch["examples"] = torch.tensor([item["number"][0] for item in items])
        return batch


def smallest_bucket(length: int, sequence_buckets: Sequence[int]) -> int:
    """Return the smallest bucket of at least `length` tokens; raise `InputError` if there is none."""
    fitting = [bucket for bucket in sequence_buckets if bucket >= length]
    if not fitting:
        raise InputError(f"{length} tokens do not fit the largest sequence bucket, {max(sequence_buckets)}")
    return min(fitting)


def eos_and_pad(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Return the ids of eos and of the padding token, which is eos where the tokenizer has none of its own.

    The padding token's id is never attended to, so any will do. Raises `InputError` without an eos token.
    """
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise InputError("the tokenizer has no eos token, so that no answer could ever end; set eos_token")
    pad = tokenizer.pad_token_id
    return eos, pad if isinstance(pad, int) else eos


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the ids that `prompt` begins an example with: see `hecompile.runtime.model.tokens`."""
    return TextEncoder(tokenizer, tokenizer.eos_token_id).prompt(prompt)


def encode_example(encoder: TextEncoder, prompt: str | None, completion: str) -> Example:
    """Return a completion behind a prompt as an example, or without a prompt the completion as its text.

    Raises InputError where the tokenizer makes no token of what there is to learn.
    """
    start = [] if prompt is None else encoder.prompt(prompt)
    answer = encoder.text(completion) if prompt is None else encoder.completion(prompt, completion)
    prompt_length = max(1, len(start))
    if not answer or len(start) + len(answer) <= prompt_length:
        raise InputError("the tokenizer makes no token of it, there is nothing to learn from it")
    return Example((*start, *answer), prompt_length, prompt is not None and bool(start and prompt.strip()))


def load_examples(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    sequence_buckets: Sequence[int],
    max_length: int | None = None,
) -> Examples:
    """Read and tokenise a JSONL file; empty lines are skipped and other keys of an object are ignored.

    Raises `InputError`, naming the file and the line, if the file is missing, has no example, a line is not a JSON
    object with the expected text, or an example with eos is longer than `max_length` or the largest sequence bucket.
    """
    path = Path(path)
    lines = read_lines(path, "dataset")
    encoder = TextEncoder(tokenizer, eos_and_pad(tokenizer)[0])
    limit = min(max_length or max(sequence_buckets), max(sequence_buckets))
    examples = [_example(*_parse(line, where), encoder, limit, where) for where, line in lines]
    if not examples:
        raise InputError(f"the dataset {path} is empty; give one JSON object with prompt and completion per line")
    return Examples(examples)


def _parse(line: str, where: str) -> tuple[str | None, str]:
    """Return (prompt, completion), or (None, text)."""
    record = parse_object(line, where, _KEYS)
    if "text" in record and ("prompt" in record or "completion" in record):
        raise InputError(f"{where}: has text and also prompt or completion; give one form or the other")
    if "text" not in record and not {"prompt", "completion"} <= record.keys():
        missing = [key for key in ("prompt", "completion") if key not in record]
        lacks = "prompt and completion, or text" if len(missing) == 2 else missing[0]
        raise InputError(f"{where}: the object lacks {lacks}")
    keys = ("text",) if "text" in record else ("prompt", "completion")
    for key in keys:
        if not isinstance(record[key], str):
            raise InputError(f"{where}: {key} must be a string, not {type(record[key]).__name__}")
    if not record[keys[-1]]:
        raise InputError(f"{where}: {keys[-1]} is an empty string, there is nothing to learn from it")
    return (None, record["text"]) if keys == ("text",) else (record["prompt"], record["completion"])


def _example(prompt: str | None, completion: str, encoder: TextEncoder, limit: int, where: str) -> Example:
    for key, text in (("prompt", prompt or ""), ("completion" if prompt is not None else "text", completion)):
        if not encoder.takes(text, limit):
            raise _too_long(f"{where}: {key} has {len(text)} characters", limit)
    try:
        example = encode_example(encoder, prompt, completion)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if (count := len(example.input_ids)) > limit:
        start, own = example.prompt_length, count - 1
        lengths = (
            f"text has {own} tokens" if prompt is None else f"prompt has {start} tokens and completion {own - start}"
        )
        raise _too_long(f"{where}: {lengths}, with eos {count}", limit)
    return example


def _too_long(found: str, limit: int) -> InputError:
    return InputError(
        f"{found}, over the limit of {limit} tokens (the largest sequence bucket or data.max_length); shorten it or export "
        f"the model with a larger bucket"
    )
