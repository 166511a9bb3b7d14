"""Measure held-out loss and exact match.

Exact match takes one forward per batch, not one per generated token: greedy decoding reproduces a completion and then ends
if and only if, with the completion itself as input (teacher forcing), the argmax at each of its positions is the next token
of the completion, after the last one any token that ends an answer, and none of these stands within it. Proof by induction:
if greedy decoding has reproduced the first k tokens, its next input is the teacher-forced one, so that its next token is the
teacher-forced argmax; and it ends at the first token that ends answers
(`hecompile.runtime.model.data.Example.matches`). This holds for a model whose logits are a function
of the prefix; where they carry noise, or rounding that depends on the batch, the two can differ at a near tie, as two runs
of greedy decoding can.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.nn.functional import cross_entropy

from hecompile.errors import NotFiniteError
from hecompile.runtime.model.adapter import AdapterModel
from hecompile.runtime.model.data import Example, Examples, PadToBucket, smallest_bucket
from hecompile.runtime.model.divergence import DomainModel, divergence_error, require_finite_loss
from hecompile.runtime.model.head import scored_positions, scored_targets
from hecompile.runtime.model.prefix import keeps_prefix


@dataclass(frozen=True)
class Evaluation:
    """Report `loss` in nats per unmasked token, over `tokens` of them, and `exact_match`.

    `exact_match` is the fraction of the `prompts` examples with a prompt whose completion and eos greedy decoding
    reproduces; None if no example has a prompt.
    """

    loss: float
    exact_match: float | None
    tokens: int
    prompts: int


def evaluate(model: AdapterModel, examples: Examples, pad_token_id: int, batch_size: int | None = None) -> Evaluation:
    """Evaluate with one forward per batch of at most `batch_size` examples (by default as many as the model takes).

    The model is in eval mode meanwhile, no gradient is recorded, and no random number is drawn here. Raises NotFiniteError,
    with what left the domains of a polynomial plan, where the loss or a value to encrypt is infinite or NaN.
    """
    collate = PadToBucket(model.sequence_buckets, pad_token_id, keeps_prefix(model))
    total_loss, tokens, matches, prompts = 0.0, 0, 0, 0
    with inference(model):
        for batch in _batches(model, examples.examples, batch_size):
            inputs: dict[str, Any] = collate([example.numbered_item() for example in batch])
            labels = inputs.pop("labels")
            scored = scored_positions(labels)  # [B, S]
            targets = scored_targets(labels)  # [N]
            try:
                logits = model(**inputs, logits_to_keep=scored).logits  # [N, V]
                assert logits is not None
                loss = cross_entropy(logits, targets, reduction="sum")
                require_finite_loss(loss)
            except NotFiniteError as error:
                outside = model.outside_domains(**inputs, labels=labels) if isinstance(model, DomainModel) else ()
                raise divergence_error(f"on held-out text {error}", outside) from None
            total_loss += float(loss)
            tokens += len(targets)
            predicted = logits.argmax(dim=-1).split(scored.sum(dim=1).tolist())  # of each example, in its order
            prompted = [pair for pair in zip(batch, predicted, strict=True) if pair[0].has_prompt]
            matches += sum(example.matches(answer.tolist(), model.answer_ends) for example, answer in prompted)
            prompts += len(prompted)
    return Evaluation(total_loss / tokens, matches / prompts if prompts else None, tokens, prompts)


def _batches(model: AdapterModel, examples: Sequence[Example], batch_size: int | None) -> Iterator[list[Example]]:
    """Yield consecutive runs of examples that keep to the model's limits on rows and on tokens with padding."""
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
def inference(model: AdapterModel) -> Iterator[None]:
    """Put the model in eval mode, without gradients; then it is as it was."""
    module = cast("torch.nn.Module", model)
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was_training)
