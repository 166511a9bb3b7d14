"""Held-out loss, exact match, and greedy generation.

Exact match takes one forward per batch, not one per generated token: greedy decoding reproduces a completion with its
eos if and only if, with the completion itself as input (teacher forcing), the argmax at each of its positions is the
next token of the completion. Proof by induction: if greedy decoding has reproduced the first k tokens, its next input
is the teacher-forced one, so that its next token is the teacher-forced argmax; and it ends at eos, as the completion
does. This holds for a model whose logits are a function of the prefix; where they carry noise, or rounding that depends
on the batch, the two can differ at a near tie, as two runs of greedy decoding can.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.nn.functional import cross_entropy

from runtime.adapter import AdapterModel
from runtime.data import IGNORED, Example, Examples, PadToBucket, smallest_bucket
from runtime.head import scored_positions, scored_targets


@dataclass(frozen=True)
class Evaluation:
    """`loss` in nats per unmasked token, over `tokens` of them; `exact_match` is the fraction of the `prompts` examples
    with a prompt whose completion and eos greedy decoding reproduces, None if no example has a prompt."""

    loss: float
    exact_match: float | None
    tokens: int
    prompts: int


def evaluate(model: AdapterModel, examples: Examples, pad_token_id: int, batch_size: int | None = None) -> Evaluation:
    """Evaluate with one forward per batch of at most `batch_size` examples (by default as many as the model takes).

    The model is in eval mode meanwhile, no gradient is recorded, and no random number is drawn here.
    """
    collate = PadToBucket(model.sequence_buckets, pad_token_id)
    total_loss, tokens, matches, prompts = 0.0, 0, 0, 0
    with _inference(model):
        for batch in _batches(model, examples.examples, batch_size):
            inputs: dict[str, Any] = collate([example.item() for example in batch])
            labels = inputs.pop("labels")
            scored = scored_positions(labels)  # [B, S]
            logits = model(**inputs, logits_to_keep=scored).logits  # [N, V]
            assert logits is not None
            targets = scored_targets(labels)  # [N]
            total_loss += float(cross_entropy(logits, targets, reduction="sum"))
            tokens += len(targets)
            wrong = torch.zeros_like(scored)  # [B, S]
            wrong[scored] = logits.argmax(dim=-1) != targets
            right = ~wrong.any(dim=1)  # [B]
            asked = torch.tensor([example.has_prompt for example in batch])  # [B]
            matches += int((right & asked).sum())
            prompts += int(asked.sum())
    return Evaluation(total_loss / tokens, matches / prompts if prompts else None, tokens, prompts)


def generate(
    model: AdapterModel,
    prompts: Sequence[Sequence[int]],
    eos_token_id: int,
    pad_token_id: int,
    max_new_tokens: int,
) -> list[list[int]]:
    """Greedy continuations of non-empty `prompts`, without the prompt, ending with eos where it was reached.

    A continuation ends at eos, at `max_new_tokens`, or where prompt and continuation fill the largest sequence bucket.
    There is no key-value cache: each new token is one forward of the whole prefix, for all prompts of a batch at once,
    so a batch takes as many forwards as its longest continuation has tokens. Ties go to the lowest token id.
    """
    longest = max(model.sequence_buckets)
    for prompt in prompts:
        smallest_bucket(len(prompt), model.sequence_buckets)
    continuations: list[list[int]] = []
    with _inference(model):
        # Each row may grow to the largest bucket, so that bucket decides how many rows go together.
        rows = max(1, min(model.batch_size, model.max_batch_tokens // longest))
        for start in range(0, len(prompts), rows):
            prefixes = [list(prompt) for prompt in prompts[start : start + rows]]
            ends = [min(len(prefix) + max_new_tokens, longest) for prefix in prefixes]
            going = [row for row, prefix in enumerate(prefixes) if len(prefix) < ends[row]]
            while going:
                tokens = _next_tokens(model, [prefixes[row] for row in going], pad_token_id)
                for row, token in zip(going, tokens, strict=True):
                    prefixes[row].append(token)
                going = [row for row in going if prefixes[row][-1] != eos_token_id and len(prefixes[row]) < ends[row]]
            continuations += [
                prefix[len(prompt) :] for prefix, prompt in zip(prefixes, prompts[start : start + rows], strict=True)
            ]
    return continuations


def _next_tokens(model: AdapterModel, prefixes: list[list[int]], pad_token_id: int) -> list[int]:
    items = [{"input_ids": prefix, "labels": [IGNORED] * len(prefix)} for prefix in prefixes]
    inputs = PadToBucket(model.sequence_buckets, pad_token_id)(items)
    last = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)  # [B, S]
    last[torch.arange(len(prefixes)), torch.tensor([len(prefix) - 1 for prefix in prefixes])] = True
    logits = model(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], logits_to_keep=last
    ).logits  # [B, V]
    assert logits is not None
    return cast("list[int]", logits.argmax(dim=-1).tolist())


def _batches(model: AdapterModel, examples: Sequence[Example], batch_size: int | None) -> Iterator[list[Example]]:
    """Consecutive runs of examples that keep to the model's limits on rows and on tokens with padding."""
    limit = min(batch_size or model.batch_size, model.batch_size)
    batch: list[Example] = []
    for example in examples:
        longest = max(len(other.input_ids) for other in [*batch, example])
        tokens = (len(batch) + 1) * smallest_bucket(longest, model.sequence_buckets)
        if batch and (len(batch) == limit or tokens > model.max_batch_tokens):
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch


@contextmanager
def _inference(model: AdapterModel) -> Iterator[None]:
    module = cast("torch.nn.Module", model)
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was_training)
