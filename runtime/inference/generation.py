"""Generate answers to prompts token by token, several prompts at once; each new token is one forward of that token alone.

As soon as an answer ends, the next prompt takes its place, so that requests to the worker stay as wide as the plan allows.
A step sends one row per live answer (and a new prompt's rows once); keys and values of what went before are kept on the
client (`hecompile.graph.attention_cache`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from hecompile.errors import InputError
from hecompile.graph.attention_cache import AttentionCache
from hecompile.runtime.client.encrypted_model import EncryptedCausalLM
from hecompile.runtime.model.adapter import AdapterModel
from hecompile.runtime.model.data import IGNORED, PadToBucket
from hecompile.runtime.model.evaluation import inference

Finish = Literal["eos", "length", "full"]
"""Why an answer ended: by a token that ends answers (eos, or another one of the checkpoint), at the limit on new tokens, or
where the plan's longest sequence was full."""


@dataclass(frozen=True)
class Sampling:
    """Choose the next token.

    temperature: 0 takes the most likely token (the lowest id of a tie); else one is drawn from
        softmax(logits / temperature).
    top_p: draws are among the most likely tokens that together have at least this probability (Holtzman et al., arXiv
        1904.09751).
    seed: of the draws. Each prompt has a generator of its own, so that its answer does not depend on the others.

    Raises InputError for a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature must be 0 or a positive number, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed must be from 0 to 2^32 - 1, got {self.seed}")

    def generator(self, prompt: int) -> torch.Generator:
        """Make the generator of the draws for the prompt of that number."""
        return torch.Generator().manual_seed((self.seed << 32) + prompt)

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """Choose the next token from logits f32 [V]."""
        if self.temperature == 0:
            return int(logits.argmax())
        # In float64 and below 0, where the smallest temperature gives 0 or -inf and never inf - inf.
        scaled = (logits.double() - logits.max()) / self.temperature
        probabilities, tokens = torch.softmax(scaled.float(), dim=0).sort(descending=True, stable=True)
        before = probabilities.cumsum(0) - probabilities  # of the tokens that are more likely
        kept = torch.where(before < self.top_p, probabilities, 0.0)
        return int(tokens[torch.multinomial(kept, 1, generator=generator)])


@dataclass(frozen=True)
class Answer:
    """Hold the tokens of an answer, without the prompt and with the token that ended it."""

    tokens: tuple[int, ...]
    finish: Finish

    def __repr__(self) -> str:
        return f"Answer({len(self.tokens)} tokens, {self.finish})"


class Steps(Protocol):
    """Compute the next token's logits of sequences that grow: up to `rows` at once, of up to `longest` tokens each."""

    rows: int
    longest: int

    def next_logits(self, tokens: Mapping[int, Sequence[int]]) -> Tensor:
        """Return f32 [n, V] for n sequences, given the tokens of each that were not given yet."""

    def forget(self, sequence: int) -> None:
        """Drop what is kept of a sequence that does not go on."""


class CachedSteps:
    """Compute each token once."""

    def __init__(self, model: EncryptedCausalLM) -> None:
        self._model, self._cache = model, AttentionCache()
        self.rows, self.longest = model.batch_size, model.sequence_buckets[-1]

    def next_logits(self, tokens: Mapping[int, Sequence[int]]) -> Tensor:
        return self._model.next_logits(self._cache, tokens)

    def forget(self, sequence: int) -> None:
        self._cache.forget(sequence)


class PrefixSteps:
    """Compute the whole prefix again for every token: for models without a cache, and to compare with."""

    def __init__(self, model: AdapterModel, pad_token_id: int) -> None:
        self._model, self._pad = model, pad_token_id
        self._prefixes: dict[int, list[int]] = {}
        self.longest = max(model.sequence_buckets)
        # Each row may grow to the largest bucket, so that bucket decides how many rows go together.
        self.rows = max(1, min(model.batch_size, model.max_batch_tokens // self.longest))

    def next_logits(self, tokens: Mapping[int, Sequence[int]]) -> Tensor:
        for sequence, new in tokens.items():
            self._prefixes.setdefault(sequence, []).extend(new)
        prefixes = [self._prefixes[sequence] for sequence in tokens]
        items = [{"input_ids": prefix, "labels": [IGNORED] * len(prefix)} for prefix in prefixes]
        inputs = PadToBucket(self._model.sequence_buckets, self._pad)(items)
        last = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)  # [B, S]
        last[torch.arange(len(prefixes)), torch.tensor([len(prefix) - 1 for prefix in prefixes])] = True
        logits = self._model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], logits_to_keep=last
        ).logits  # [B, V]
        return cast("Tensor", logits)

    def forget(self, sequence: int) -> None:
        self._prefixes.pop(sequence, None)


def generate(
    model: AdapterModel,
    steps: Steps,
    prompts: Sequence[Sequence[int]],
    eos_token_id: int | Set[int],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    on_answer: Callable[[int, Answer], None] = lambda number, answer: None,
    numbers: Sequence[int] | None = None,
) -> list[Answer]:
    """Answer each of `prompts` (token ids), in their order; `on_answer` is called with each as soon as it has ended.

    An answer ends at eos, after `max_new_tokens`, or where prompt and answer fill the longest sequence that `steps` take.
    The model is in eval mode meanwhile.

    eos_token_id: one, or all that end an answer.
    numbers: what each prompt's draws depend on; by default its place.

    Raises InputError, before anything is computed, for a prompt that is empty or too long.
    """
    sampling = sampling or Sampling()
    _check_prompts(prompts, max_new_tokens, steps.longest)
    ends = {eos_token_id} if isinstance(eos_token_id, int) else eos_token_id
    generators = [sampling.generator(number) for number in (range(len(prompts)) if numbers is None else numbers)]
    waiting = deque(range(len(prompts)))
    written: dict[int, list[int]] = {}
    answers: dict[int, Answer] = {}

    def end_if_finished(number: int) -> None:
        tokens, length = written[number], len(prompts[number]) + len(written[number])
        finish = _finish(tokens, length, ends, max_new_tokens, steps.longest)
        if finish is None:
            return
        answers[number] = Answer(tuple(written.pop(number)), finish)
        steps.forget(number)
        on_answer(number, answers[number])

    with inference(model):
        while waiting or written:
            while waiting and len(written) < steps.rows:
                number = waiting.popleft()
                written[number] = []
                end_if_finished(number)  # a prompt may fill the longest sequence by itself
            if not written:
                continue
            new = {number: tokens[-1:] or prompts[number] for number, tokens in written.items()}
            for number, logits in zip(list(new), steps.next_logits(new), strict=True):
                written[number].append(sampling.choose(logits, generators[number]))
                end_if_finished(number)
    return [answers[number] for number in range(len(prompts))]


def _check_prompts(prompts: Sequence[Sequence[int]], max_new_tokens: int, longest: int) -> None:
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise InputError(f"prompt {number} is empty; give at least one token")
        if len(prompt) > longest:
            raise InputError(
                f"prompt {number} has {len(prompt)} tokens, the plan takes sequences of at most {longest}: shorten it, or "
                f"export the model with a larger sequence bucket"
            )


def _finish(
    tokens: Sequence[int], length: int, ends: Set[int], max_new_tokens: int, longest: int
) -> Finish | None:
    """Say why an answer of `tokens` ends, which is `length` tokens long with its prompt; None where it goes on."""
    if tokens and tokens[-1] in ends:
        return "eos"
    if len(tokens) == max_new_tokens:
        return "length"
    return "full" if length == longest else None
