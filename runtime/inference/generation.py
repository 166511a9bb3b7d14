"""Answers to prompts, token by token: several prompts at once, each new token one forward of that token alone.

As soon as an answer ends, the next prompt takes its place, so that requests to the worker stay as wide as the plan allows.
A step sends one row per live answer (and a new prompt's rows once); keys and values of what went before are kept on the
client (`hecompile.graph.attention_cache`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
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
"""Why an answer ended: by itself, at the number of tokens asked for, or where the plan's longest sequence was full."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    temperature: 0 takes the most likely token (the lowest id of a tie); else one is drawn from
    softmax(logits / temperature).
    top_p: of the most likely tokens that together have at least this probability (Holtzman et al., arXiv 1904.09751).
    seed: of the draws. Each prompt has a generator of its own, so that its answer does not depend on the others.
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
        """Of the draws for the prompt of that number."""
        return torch.Generator().manual_seed((self.seed << 32) + prompt)

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """The next token from logits f32 [V]."""
        if self.temperature == 0:
            return int(logits.argmax())
        probabilities, tokens = torch.softmax(logits / self.temperature, dim=0).sort(descending=True, stable=True)
        before = probabilities.cumsum(0) - probabilities  # of the tokens that are more likely
        kept = torch.where(before < self.top_p, probabilities, 0.0)
        return int(tokens[torch.multinomial(kept, 1, generator=generator)])


@dataclass(frozen=True)
class Answer:
    """tokens: without the prompt, with eos where it was reached."""

    tokens: tuple[int, ...]
    finish: Finish

    def __repr__(self) -> str:
        return f"Answer({len(self.tokens)} tokens, {self.finish})"


class Steps(Protocol):
    """What computes the next token's logits of sequences that grow. rows: how many at once; longest: tokens of one."""

    rows: int
    longest: int

    def next_logits(self, tokens: Mapping[int, Sequence[int]]) -> Tensor:
        """f32 [n, V] for n sequences, given the tokens of each that were not given yet."""

    def forget(self, sequence: int) -> None:
        """It does not go on."""


class CachedSteps:
    """Computes each token once."""

    def __init__(self, model: EncryptedCausalLM) -> None:
        self._model, self._cache = model, AttentionCache()
        self.rows, self.longest = model.batch_size, model.sequence_buckets[-1]

    def next_logits(self, tokens: Mapping[int, Sequence[int]]) -> Tensor:
        return self._model.next_logits(self._cache, tokens)

    def forget(self, sequence: int) -> None:
        self._cache.forget(sequence)


class PrefixSteps:
    """Computes the whole prefix again for every token: for models without a cache, and to compare with."""

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
    eos_token_id: int,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    on_answer: Callable[[int, Answer], None] = lambda number, answer: None,
    numbers: Sequence[int] | None = None,
) -> list[Answer]:
    """An answer to each of `prompts` (token ids), in their order; `on_answer` hears of each as soon as it has ended.

    numbers: what each prompt's draws depend on; by default its place.

    An answer ends at eos, after `max_new_tokens`, or where prompt and answer fill the longest sequence that `steps` take.
    The model is in eval mode meanwhile. Raises InputError, before anything is computed, for a prompt that is empty or too
    long.
    """
    sampling = sampling or Sampling()
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise InputError(f"prompt {number} is empty; give at least one token")
        if len(prompt) > steps.longest:
            raise InputError(
                f"prompt {number} has {len(prompt)} tokens, the plan takes sequences of at most {steps.longest}: shorten "
                f"it, or export the model with a larger sequence bucket"
            )
    answers: dict[int, Answer] = {}
    waiting = deque(range(len(prompts)))
    written: dict[int, list[int]] = {}
    generators = [sampling.generator(number) for number in (range(len(prompts)) if numbers is None else numbers)]

    def end(number: int, finish: Finish) -> None:
        answers[number] = Answer(tuple(written.pop(number)), finish)
        steps.forget(number)
        on_answer(number, answers[number])

    with inference(model):
        while waiting or written:
            while waiting and len(written) < steps.rows:
                number = waiting.popleft()
                written[number] = []
                if len(prompts[number]) == steps.longest:
                    end(number, "full")
            if not written:
                continue
            new = {number: tokens[-1:] or prompts[number] for number, tokens in written.items()}
            for number, logits in zip(list(new), steps.next_logits(new), strict=True):
                tokens = written[number]
                tokens.append(sampling.choose(logits, generators[number]))
                if tokens[-1] == eos_token_id:
                    end(number, "eos")
                elif len(tokens) == max_new_tokens:
                    end(number, "length")
                elif len(prompts[number]) + len(tokens) == steps.longest:
                    end(number, "full")
    return [answers[number] for number in range(len(prompts))]
