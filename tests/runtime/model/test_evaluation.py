from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from hecompile.errors import InputError
from hecompile.runtime.inference.generation import PrefixSteps, generate
from hecompile.runtime.model.data import Example, Examples, load_examples
from hecompile.runtime.model.evaluation import evaluate
from hecompile.runtime.model.plaintext import PlaintextPeftModel
from tests.support.training import BUCKETS, RECORDS, make_model, make_tokenizer, write_jsonl

TOKENIZER = make_tokenizer()
PAD = 0
PROMPTS = [[1, 70, 80], [1, 75], [1, *range(90, 104)], [1, 66, 67, 68], [1, 5, 9]]


@pytest.fixture(scope="module")
def model() -> PlaintextPeftModel:
    return make_model(dropout=0.5)


@pytest.fixture(scope="module")
def eos(model: PlaintextPeftModel) -> int:
    """Find a token that ends some continuations of PROMPTS and not others."""
    continuations = [one_by_one(model, prompt, 12, eos=-1) for prompt in PROMPTS]
    later = {token for tokens in continuations for token in tokens[3:]}
    return min(token for token in later if not all(token in tokens for tokens in continuations))


def one_by_one(model: PlaintextPeftModel, prompt: list[int], max_new_tokens: int, eos: int) -> list[int]:
    """Greedy decoding without batches and without padding."""
    ids = list(prompt)
    while len(ids) - len(prompt) < max_new_tokens and len(ids) < max(BUCKETS):
        row = torch.tensor([ids])
        ids.append(int(model.eval()(row, torch.ones_like(row)).logits[0, -1].argmax()))
        if ids[-1] == eos:
            break
    return ids[len(prompt) :]


def answers_of(model: PlaintextPeftModel, prompts: list[list[int]], eos: int, most: int) -> list[list[int]]:
    return [list(answer.tokens) for answer in generate(model, PrefixSteps(model, PAD), prompts, eos, most)]


def test_generation_equals_decoding_one_prompt_at_a_time(model: PlaintextPeftModel, eos: int) -> None:
    generated = answers_of(model, PROMPTS, eos, 12)
    assert generated == [one_by_one(model, prompt, 12, eos) for prompt in PROMPTS]
    assert any(tokens[-1] == eos for tokens in generated) and any(tokens[-1] != eos for tokens in generated)


def test_generation_stops_at_the_largest_bucket(model: PlaintextPeftModel, eos: int) -> None:
    long = [[1, *range(70, 99)]]  # 30 tokens of 32
    assert len(answers_of(model, long, -1, 9)[0]) == 2
    full = generate(model, PrefixSteps(model, PAD), [[1, *range(70, 101)], [1, 70]], -1, 1)
    assert [(len(answer.tokens), answer.finish) for answer in full] == [(0, "full"), (1, "length")]
    with pytest.raises(InputError, match="max_new_tokens must be at least 1, got 0"):
        generate(model, PrefixSteps(model, PAD), PROMPTS, eos, 0)


def test_generation_takes_as_many_forwards_as_the_longest_continuation(model: PlaintextPeftModel, eos: int) -> None:
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    generated = answers_of(model, PROMPTS[:4], eos, 12)
    hook.remove()
    assert len(calls) == max(len(tokens) for tokens in generated)


def test_exact_match_agrees_with_generation(model: PlaintextPeftModel, eos: int) -> None:
    answers = [one_by_one(model, prompt, 12, eos) for prompt in PROMPTS]
    candidates = []
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        body = answer[:-1] if answer[-1] == eos else answer
        wrong = [*body[:-1], 200] if body else [200]
        for completion in (body, body[:-1], wrong):  # right if it ended by itself; too short; the last token is wrong
            candidates.append(Example((*prompt, *completion, eos), len(prompt), has_prompt=True))
    matches = [evaluate(model, Examples([example]), PAD).exact_match == 1.0 for example in candidates]
    completions = [list(example.input_ids[example.prompt_length :]) for example in candidates]
    prompts = [list(example.input_ids[: example.prompt_length]) for example in candidates]
    generated = answers_of(model, prompts, eos, 14)
    assert matches == [mine == theirs for mine, theirs in zip(generated, completions, strict=True)]
    assert any(matches) and not all(matches)
    together = evaluate(model, Examples(candidates), PAD)
    assert together.exact_match == sum(matches) / len(matches)


def test_an_answer_ends_at_the_first_eos() -> None:
    assert Example((1, 7, 8, 2), 2, True).matches([8, 2])
    for answer in ([8], [8, 2, 2], [2], [], [7, 8, 2]):
        assert not Example((1, 7, 8, 2), 2, True).matches(answer)
    assert Example((2, 7, 2), 2, True).matches([2])  # eos before the completion is the prompt's
    assert not Example((1, 7, 8, 2, 9, 2), 2, True).matches([8, 2, 9, 2])


def test_the_loss_is_the_mean_over_unmasked_tokens_whatever_the_batches(tmp_path: Path) -> None:
    model = make_model(dropout=0.5)
    examples = load_examples(write_jsonl(tmp_path / "a.jsonl", [*RECORDS, {"text": "plain"}]), TOKENIZER, BUCKETS)
    total, count = 0.0, 0
    for example in examples.examples:
        row = torch.tensor([example.input_ids])
        logits = model.eval()(row, torch.ones_like(row)).logits[0, example.prompt_length - 1 : -1]
        total += cross_entropy(logits, row[0, example.prompt_length :], reduction="sum").item()
        count += len(example.input_ids) - example.prompt_length
    model.train()
    for batch_size in (1, 3, None):
        result = evaluate(model, examples, PAD, batch_size)
        assert math.isclose(result.loss, total / count, rel_tol=1e-5)
        assert (result.tokens, result.prompts) == (count, len(RECORDS))
    assert model.training


def test_batches_keep_to_the_models_limits(tmp_path: Path) -> None:
    model = make_model(batch_size=4, max_batch_tokens=64)
    shapes = []
    model.register_forward_pre_hook(lambda _, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True)
    examples = load_examples(write_jsonl(tmp_path / "a.jsonl", RECORDS), TOKENIZER, BUCKETS)
    result = evaluate(model, examples, PAD)
    assert sum(rows for rows, _ in shapes) == len(RECORDS) == result.prompts
    assert max(rows * width for rows, width in shapes) == 64
    assert max(rows for rows, _ in shapes) <= 4


def test_exact_match_needs_prompts(tmp_path: Path) -> None:
    examples = load_examples(write_jsonl(tmp_path / "a.jsonl", [{"text": "plain"}]), TOKENIZER, BUCKETS)
    assert evaluate(make_model(), examples, PAD).exact_match is None
