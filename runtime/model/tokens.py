"""Turn text into the ids that training, evaluation, inference and CKKS answers all use.

The ids are those that the tokenizer makes of the text as it stands. What its template puts before a text (bos, for Llama)
goes first, unless the text begins with it; what the template puts behind is left out. Eos ends an example, unless the text
ends in eos itself.

A prompt's ids are those of the prompt alone, because an answer is asked for without knowing it. A completion's ids are the
rest of those of the joined text: a tokenizer that begins every text with a space puts none between the two. Where one token
would cross the cut (prompt `Answer: `, completion `Doctor`, token ` Doctor`), the completion is tokenised behind another
text, which leaves it whole. None of this needs offsets, so that it holds for tokenizers written in Python too.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from hecompile.errors import InputError

_PROBE = "a"
"""A text that shows what the template puts before any."""
_CONTEXTS = ("\n", ".", "a")
"""Texts that a completion is tokenised behind where neither its prompt nor the prompt's last character leaves it whole."""
_ALWAYS_TAKEN = 1 << 16
_NEVER_TAKEN = 1 << 21
"""Characters that a tokenizer is or is not given, whatever the limit on tokens: each takes it 2 µs and 250 bytes."""


class TextEncoder:
    """Encode texts with one tokenizer, whose eos has the id `eos`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos: int | None) -> None:
        self._tokenizer, self._eos = tokenizer, eos
        plain, full = self._ids(_PROBE), list(tokenizer(_PROBE, verbose=False)["input_ids"])
        found = [at for at in range(len(full)) if plain and full[at : at + len(plain)] == plain]
        self._lead: list[int] = full[: found[0]] if found else []

    def prompt(self, text: str) -> list[int]:
        """Return the ids of a prompt, behind which an answer is written."""
        ids = self._ids(text)
        return ids if ids[: len(self._lead)] == self._lead else [*self._lead, *ids]

    def completion(self, prompt: str, completion: str) -> list[int]:
        """Return the ids that follow `self.prompt(prompt)`, with eos at their end; none where there is no token."""
        for context in (prompt, prompt[-1:], *_CONTEXTS):
            start, whole = self._ids(context), self._ids(context + completion)
            # An unknown token may hold more than the context; one without a token says nothing, but the prompt counts.
            known = start[-1] != self._tokenizer.unk_token_id if start else context == prompt
            if known and len(whole) > len(start) and whole[: len(start)] == start:
                return self._ended(whole[len(start) :])
        return self._ended(self._ids(completion))

    def text(self, text: str) -> list[int]:
        """Return the ids of a text without a prompt, with eos at their end; none where there is no token."""
        return self._ended(self.prompt(text)) if self._ids(text) else []

    def takes(self, text: str, limit: int) -> bool:
        """Tell whether so many characters may be within `limit` tokens: whether it is worth the time to count those."""
        return len(text) <= min(max(limit * self._longest, _ALWAYS_TAKEN), _NEVER_TAKEN)

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._tokenizer.get_vocab()))

    def _ended(self, ids: list[int]) -> list[int]:
        return ids if self._eos is None or not ids or ids[-1] == self._eos else [*ids, self._eos]

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def encode_prompts(
    encoder: TextEncoder, prompts: Iterable[tuple[str, str | None]], longest: int, new_tokens: int | None = None
) -> list[list[int]]:
    """Return the ids of prompts, each given with what an error calls it: its file and line, or None for its number.

    Raises InputError for a prompt that is blank, has half a character or no token, or has more tokens than a sequence of
    `longest` has room for; with `new_tokens`, it has room for all of these but the last, which is not computed on.
    """
    encoded = []
    for number, (text, where) in enumerate(prompts, start=1):
        name = f"prompt {number}" if where is None else f"{where}: the prompt"
        if not text.strip():
            raise InputError(f"{name} is empty; give some text")
        if has_half_characters(text):
            raise InputError(f"{name} has half a character, or a byte that is not UTF-8; write it in UTF-8")
        if not encoder.takes(text, longest):
            raise _too_long(f"{name} has {len(text)} characters", longest, new_tokens)
        ids = encoder.prompt(text)
        if not ids:
            raise InputError(f"{name} is empty: the tokenizer makes no token of it; give some text")
        if len(ids) + (new_tokens or 1) - 1 > longest:
            raise _too_long(f"{name} has {len(ids)} tokens", longest, new_tokens)
        encoded.append(ids)
    return encoded


def _too_long(found: str, longest: int, new_tokens: int | None) -> InputError:
    if new_tokens is None:
        limit = f"the plan takes sequences of at most {longest}: shorten it, or"
    else:
        limit = f"with {new_tokens} new ones more than the plan's {longest}: shorten it, ask for fewer or"
    return InputError(f"{found}, {limit} export the model with room for more")


def has_half_characters(text: str) -> bool:
    """Tell whether a text has a lone surrogate: half a character of JSON, or a byte that is not UTF-8 of a command line."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
