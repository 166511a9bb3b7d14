"""Inference through the interactive plan: the cache changes nothing, answers are PEFT's, runs go on, errors are clear."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hecompile.errors import InputError
from hecompile.files import only_writer
from hecompile.runtime.client.encrypted_model import EncryptedCausalLM
from hecompile.runtime.client.products import CleartextProducts
from hecompile.runtime.client.session import Session
from hecompile.runtime.inference.answers import Prompt, Reply, infer, read_prompts
from hecompile.runtime.inference.generation import CachedSteps, PrefixSteps, Sampling, generate
from hecompile.runtime.model.data import load_examples
from hecompile.runtime.model.evaluation import evaluate
from tests.e2e.conftest import SEQUENCE_BUCKETS, Build

TEXTS = ["Question: Who", "The", "Question: Where does the baker live?\nAnswer:", "In the", "A", "Who is it?"]
"""More than the plan takes at once, of different lengths: some join as others end."""


@pytest.fixture
def model(build: Build, adapter: dict[str, Tensor]) -> EncryptedCausalLM:
    with pytest.warns(UserWarning, match="NOTHING IS ENCRYPTED"):
        made = EncryptedCausalLM(build.client, CleartextProducts(build.client, build.worker))
    made.load_adapter_state(adapter)
    return made


@pytest.fixture
def prompts(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_p=0.9, seed=3)])
def test_the_cache_changes_no_token(model: EncryptedCausalLM, prompts: list[list[int]], sampling: Sampling) -> None:
    cached = generate(model, CachedSteps(model), prompts, 2, 10, sampling)
    computed = model.stats()["tokens"]
    again = generate(model, PrefixSteps(model, 0), prompts, 2, 10, sampling)
    assert cached == again
    # Every token once: the prompts, and each answer's but its last.
    assert computed == sum(len(p) + len(a.tokens) - 1 for p, a in zip(prompts, cached, strict=True))
    assert model.stats()["tokens"] > 2 * computed


def test_an_answer_does_not_depend_on_the_other_prompts(model: EncryptedCausalLM, prompts: list[list[int]]) -> None:
    drawn = Sampling(temperature=1.5, seed=1)
    together = generate(model, CachedSteps(model), prompts, 2, 6, drawn)
    alone = [generate(model, CachedSteps(model), [p], 2, 6, drawn, numbers=[n])[0] for n, p in enumerate(prompts)]
    assert together == alone and len({answer.tokens for answer in together}) > 1


def test_encrypted_answers_are_those_of_peft(
    build: Build, adapter: dict[str, Tensor], prompts: list[list[int]]
) -> None:
    """Greedy, teacher-forced on PEFT's own answers: the same next token wherever it is not nearly tied."""
    plaintext, encrypted = build.plaintext(), build.encrypted()
    for made in (plaintext, encrypted):
        made.load_adapter_state(adapter)
    wanted = generate(plaintext, PrefixSteps(plaintext, 0), prompts[:4], -1, 8)
    steps = CachedSteps(encrypted)
    compared = 0
    with torch.no_grad():
        for place in range(8):
            new = {n: prompts[n] if place == 0 else [wanted[n].tokens[place - 1]] for n in range(4)}
            logits = steps.next_logits(new)
            top = logits.topk(2).values
            for n in range(4):
                if top[n, 0] - top[n, 1] > 0.3:  # twice what quantisation and noise may move a logit
                    assert int(logits[n].argmax()) == wanted[n].tokens[place]
                    compared += 1
    assert compared > 16


def test_an_interrupted_run_goes_on(
    model: EncryptedCausalLM, tokenizer: PreTrainedTokenizerBase, build: Build, tmp_path: Path
) -> None:
    session = Session(model, tokenizer, build.client)
    asked = [Prompt(text, " x" if number % 2 else None) for number, text in enumerate(TEXTS)]
    drawn = Sampling(temperature=1.0, seed=5)
    whole = infer(session, asked, 5, drawn, tmp_path / "whole.jsonl")
    out, seen = tmp_path / "out.jsonl", []

    def stop_after_two(number: int, reply: Reply) -> None:
        seen.append(number)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        infer(session, asked, 5, drawn, out, stop_after_two)
    assert not out.exists() and len((tmp_path / "out.jsonl.partial").read_text().splitlines()) == 3
    before = model.stats()["tokens"]
    assert infer(session, asked, 5, drawn, out) == whole
    assert model.stats()["tokens"] - before < before
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and not list(tmp_path.glob("*.partial"))
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["prompt"] for record in records] == TEXTS
    assert ["match" in record for record in records] == [False, True] * 3


def test_a_match_is_what_evaluation_counts(
    model: EncryptedCausalLM, tokenizer: PreTrainedTokenizerBase, build: Build, tmp_path: Path
) -> None:
    """Completions that the model writes, and others that differ by a space, a line or an eos."""
    session = Session(model, tokenizer, build.client)
    texts = [*TEXTS, "Question: Who treats Ada Stone?\nAnswer:", "<s>The", "user: hi</s>", "Answer: "]
    written = infer(session, [Prompt(text) for text in texts], 40)
    ends = ("", "</s>", " ", "\n", "</s> more", "\nmore")
    asked = [
        Prompt(text, reply.answer + end)
        for text, reply in zip(texts, written, strict=True)
        for end in ends
        if reply.answer and reply.finish == "eos"
    ]
    assert len(asked) >= 3 * len(ends)
    matches = [reply.match for reply in infer(session, asked, 60)]
    for prompt, match in zip(asked, matches, strict=True):
        path = tmp_path / "one.jsonl"
        path.write_text(json.dumps({"prompt": prompt.text, "completion": prompt.completion}))
        examples = load_examples(path, tokenizer, model.sequence_buckets)
        assert match == (evaluate(model, examples, 0).exact_match == 1.0), prompt.completion
    assert matches.count(True) >= len(asked) // 6


def test_answers_that_are_there_are_not_overwritten(
    model: EncryptedCausalLM, tokenizer: PreTrainedTokenizerBase, build: Build, tmp_path: Path
) -> None:
    session, out = Session(model, tokenizer, build.client), tmp_path / "out.jsonl"
    asked, partial = [Prompt("A"), Prompt("B")], tmp_path / "out.jsonl.partial"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        infer(session, asked, 2, out=out, on_reply=stop)
    kept = partial.read_text()
    with pytest.raises(InputError, match=r"out\.jsonl\.partial has unfinished answers of another request"):
        infer(session, asked, 3, out=out)
    assert partial.read_text() == kept
    partial.write_text(kept + '{"number": 1, "ans')  # as a kill leaves it
    replies = infer(session, asked, 2, out=out)
    whole = out.read_bytes()
    assert len(replies) == 2 and [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    with pytest.raises(InputError, match=r"out\.jsonl exists; delete it, or give another --out"):
        infer(session, asked, 2, out=out)
    assert out.read_bytes() == whole
    with (
        only_writer(tmp_path / "b.jsonl"),
        pytest.raises(InputError, match=r"b\.jsonl is being written by another process"),
    ):
        infer(session, asked, 2, out=tmp_path / "b.jsonl")


def test_bad_input_is_named_before_anything_is_computed(
    model: EncryptedCausalLM, tokenizer: PreTrainedTokenizerBase, build: Build, tmp_path: Path
) -> None:
    session = Session(model, tokenizer, build.client)
    with pytest.raises(InputError, match=rf"prompt 2 has \d+ tokens, the plan takes .* at most {SEQUENCE_BUCKETS[-1]}"):
        infer(session, [Prompt("A"), Prompt("word " * 200)], 5)
    with pytest.raises(InputError, match="q, line 2: the completion cannot be compared with: it has half a character"):
        infer(session, [Prompt("A", "\ud83d", "q, line 2")], 5)
    with pytest.raises(InputError, match="prompt 1 is empty"):
        generate(model, CachedSteps(model), [[]], 2, 5)
    assert model.stats()["tokens"] == 0
    for options, message in (({"temperature": -1.0}, "temperature must be"), ({"top_p": 0.0}, "top_p must be")):
        with pytest.raises(InputError, match=message):
            Sampling(**options)
    with pytest.raises(InputError, match="is a directory"):
        infer(session, [Prompt("A")], 5, out=tmp_path)
    bad = tmp_path / "bad.jsonl"
    for text, message in (
        ("{", "line 1: not valid JSON"), ('{"completion": "SECRET"}', "a string prompt"), ("\n", "holds no prompt"),
        ('{"prompt": "SECRET", "completion": ""}', "line 1: completion is an empty string"),
        ('{"prompt": "SECRET", "prompt": "A"}', "line 1: prompt is given 2 times"),
        ('{"prompt": "SECRET\\ud83d"}', "line 1: prompt has half a character"),
        ('\n{"prompt": "SECRET", "id": ' + "[" * 100_000, "line 2: lists or objects are nested too deeply"),
    ):  # fmt: skip
        bad.write_text(text)
        with pytest.raises(InputError, match=message) as caught:
            read_prompts(bad)
        assert "SECRET" not in str(caught.value)
    (tmp_path / "plain.txt").write_text("One\n\nTwo\n")
    assert read_prompts(tmp_path / "plain.txt") == [Prompt("One"), Prompt("Two")]
    (tmp_path / "plain.txt").write_bytes(b"\xef\xbb\xbfOne\r\n \r\nTwo \rThree")
    assert read_prompts(tmp_path / "plain.txt") == [Prompt("One"), Prompt("Two "), Prompt("Three")]
    for content, message in ((b"One\nTw\0o", "line 2: has a NUL"), (b"One\nTw\xe9", r"\(byte 6\): see line 2")):
        (tmp_path / "plain.txt").write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_prompts(tmp_path / "plain.txt")
    assert "SECRET" not in repr(Prompt("SECRET")) + repr(Reply("SECRET", 1, "eos"))
