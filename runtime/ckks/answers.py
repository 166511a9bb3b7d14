"""Complete prompts greedily through a polynomial plan: every new token is one evaluation of all prompts together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from hecompile.errors import InputError
from hecompile.foreign import printable
from hecompile.runtime.ckks.client import CkksSession, Progress
from hecompile.runtime.model.tokens import TextEncoder, encode_prompts
from hecompile.runtime.model.unknown_words import unknown_words


def complete(
    session: CkksSession,
    prompts: Sequence[str],
    new_tokens: int,
    progress: Progress = lambda *_: None,
    places: Sequence[str | None] | None = None,
) -> list[str]:
    """Return the likeliest `new_tokens` tokens after each prompt; an answer ends at any token that ends answers.

    Prompts may differ in length: the mask is causal, so that padding after a prompt changes nothing before it. `places` are
    what errors call the prompts: file and line, or None for the number.

    Raises:
        InputError: a prompt is empty, has a word that the model does not know, or is with its answer longer than the plan's
            sequences; or the plan has logits of the last position alone, and a prompt is shorter or more than one token is
            asked for.
    """
    plan, tokenizer = session.plan, session.tokenizer
    encoder, named = TextEncoder(tokenizer, tokenizer.eos_token_id), places or [None] * len(prompts)
    rows = encode_prompts(encoder, zip(prompts, named, strict=True), plan.sequence_length, new_tokens)
    for number, (prompt, place) in enumerate(zip(prompts, named, strict=True), start=1):
        if unknown := unknown_words(tokenizer, prompt):
            raise InputError(
                f"{place or f'prompt {number}'}: the model's vocabulary has no {printable(unknown[0], 60)!r}, and it would "
                "be answered as if it were not there; write it in other words"
            )
    for row in rows:
        if plan.last_only and (len(row) != plan.sequence_length or new_tokens > 1):
            raise InputError(f"the plan has logits of the last position alone: prompts need {plan.sequence_length} tokens")
    starts = [len(row) for row in rows]
    ended = [False] * len(rows)
    ends = session.answer_ends | {tokenizer.eos_token_id}
    for _ in range(new_tokens):
        padded = [padded_row(row, plan.sequence_length, tokenizer.eos_token_id) for row in rows]
        logits = session.logits(np.array(padded, dtype=np.int64), progress)
        for number, row in enumerate(rows):
            token = int(logits[number, -1 if plan.last_only else len(row) - 1].argmax())
            ended[number] |= token in ends
            if not ended[number]:
                row.append(token)
        if all(ended):
            break
    return [str(tokenizer.decode(row[start:])) for row, start in zip(rows, starts, strict=True)]


def padded_row(row: Sequence[int], length: int, end: int | None) -> list[int]:
    """Fill a row of tokens up to `length` with what the model was calibrated on.

    The worker evaluates the positions after a prompt as well, and a value that leaves the domains there ends the whole
    evaluation. The token that ends a text is one that the model writes itself, also several times; a token that it never
    writes, such as the padding of training, leaves them after a short prompt. Without such a token the row is repeated.
    """
    filler = [end] if end is not None else row
    return [*row, *itertools.islice(itertools.cycle(filler), length - len(row))]
