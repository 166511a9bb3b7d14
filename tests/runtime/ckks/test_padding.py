"""Short prompts are padded by what the polynomials are made for, and words that the model does not know are named."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from hecompile.ckks.parameters import CkksParameters
from hecompile.compiler.ckks import lower_checkpoint
from hecompile.compiler.frontend import load_checkpoint
from hecompile.compiler.options import CkksOptions
from hecompile.errors import InputError
from hecompile.graph.interpreter import Interpreter
from hecompile.models import REDUCED_POLYNOMIAL
from hecompile.passes.polynomial.expand_polynomials import EMBEDDINGS
from hecompile.runtime.ckks.answers import complete, padded_row
from hecompile.runtime.model.unknown_words import unknown_words

LENGTH = 14
TEXT = Path("models/reduced-text/public-heldout.jsonl")


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(str(REDUCED_POLYNOMIAL))


@pytest.fixture(scope="module")
def lowered() -> tuple[Interpreter, CkksParameters, Tensor]:
    checkpoint = load_checkpoint(str(REDUCED_POLYNOMIAL))
    graph, parameters, _ = lower_checkpoint(checkpoint, CkksOptions(LENGTH))
    return Interpreter(graph), parameters, checkpoint.model.get_input_embeddings().weight.detach()


def leaving(lowered: tuple[Interpreter, CkksParameters, Tensor], rows: list[list[int]]) -> int:
    """Count the rows with a value that a ciphertext cannot hold, in an evaluation in the clear."""
    interpreter, parameters, table = lowered
    peaks = torch.zeros(len(rows))

    def observe(_: object, value: Tensor) -> None:
        nonlocal peaks
        if value.dim() and len(value) == len(rows) and value.is_floating_point():
            largest = value.abs().reshape(len(rows), -1).amax(1)
            peaks = torch.maximum(peaks, torch.nan_to_num(largest, nan=torch.inf, posinf=torch.inf))

    interpreter.run({EMBEDDINGS: table[torch.tensor(rows)]}, observer=observe)
    return int((peaks > parameters.value_bound).sum())


@pytest.mark.parametrize("length", [1, 2, 3, 5, 6, 8, 13])
def test_no_prompt_is_too_short(
    lowered: tuple[Interpreter, CkksParameters, Tensor], tokenizer: transformers.PreTrainedTokenizerBase, length: int
) -> None:
    texts = [json.loads(line)["text"] for line in TEXT.read_text().splitlines()[:50]]
    prompts = [tokenizer(text)["input_ids"][:length] for text in texts]
    assert leaving(lowered, [padded_row(prompt, LENGTH, tokenizer.eos_token_id) for prompt in prompts]) == 0
    if length == 5:  # what was done before
        assert leaving(lowered, [[*prompt, *[0] * (LENGTH - length)] for prompt in prompts]) == len(prompts)


def test_a_row_is_filled_to_its_length() -> None:
    assert padded_row([5, 6], 5, 2) == [5, 6, 2, 2, 2] and padded_row([5, 6], 2, 2) == [5, 6]
    assert padded_row([5, 6], 5, None) == [5, 6, 5, 6, 5]


def test_words_outside_the_vocabulary_are_found(tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    assert unknown_words(tokenizer, "felt in Dale costs 3") == []
    assert unknown_words(tokenizer, "zebra in Zürich costs") == ["zebra", "Zürich"]
    tiny = transformers.AutoTokenizer.from_pretrained("models/tiny-llama")
    assert unknown_words(tiny, "zebra é \U0001f600") == []  # bytes: nothing is unknown


def test_a_prompt_with_such_a_word_is_refused_before_anything_is_sent(
    tokenizer: transformers.PreTrainedTokenizerBase,
) -> None:
    def logits(*_: object) -> np.ndarray:
        raise AssertionError("sent")

    plan = SimpleNamespace(sequence_length=LENGTH, last_only=False)
    session: Any = SimpleNamespace(plan=plan, tokenizer=tokenizer, answer_ends=frozenset(), logits=logits)
    with pytest.raises(InputError, match="prompt 2: the model's vocabulary has no 'zebra'"):
        complete(session, ["felt", "zebra in Dale"], 1)
