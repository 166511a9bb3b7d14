"""The ids of prompts and completions, for tokenizers that add to a text in different ways."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from tokenizers import normalizers

from hecompile.errors import InputError
from hecompile.runtime.model.data import encode_example, encode_prompt
from hecompile.runtime.model.tokens import TextEncoder, encode_prompts, has_half_characters
from tests.support.tokenizers import KINDS, byte_level, metaspace, word_piece
from tests.support.training import make_tokenizer

PAIRS = [
    ("Q:", " A"), ("[INST]x[/INST]", "worker"), ("Q:", " A</s>"), ("<s>Q:", " A"), ("user: hi</s>", " A"),
    ("Q:\n", "A\nB \n"), ("Q:", " A</s> B"), ("Q: ", " A"), ("", "worker"), ("Q:", "</s>"),
]  # fmt: skip
"""Pairs whose joined text has a token boundary between the two, for every kind of tokenizer."""
CROSSED = [("Answer: ", "Doctor"), ("Q: wor", "ker"), ("play", "ing")]
"""Pairs with one token across the boundary, for some."""
made = cache(lambda kind: KINDS[kind]())


def plain(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def lead(tokenizer: Any) -> list[int]:
    full = list(tokenizer("x")["input_ids"])
    return full[: full.index(plain(tokenizer, "x")[0])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_an_example_has_the_tokens_of_its_text_one_bos_and_one_eos(kind: str, prompt: str, completion: str) -> None:
    tokenizer = made(kind)
    eos, whole, before = tokenizer.eos_token_id, plain(tokenizer, prompt + completion), lead(tokenizer)
    if whole[: len(before)] != before:
        whole = [*before, *whole]
    if whole[-1] != eos:
        whole.append(eos)
    encoder = TextEncoder(tokenizer, eos)
    example = encode_example(encoder, prompt, completion)
    assert list(example.input_ids) == whole
    assert list(example.input_ids) == encoder.text(prompt + completion)
    if example.has_prompt:
        assert list(example.input_ids[: example.prompt_length]) == encode_prompt(tokenizer, prompt)
    assert example.has_prompt == bool(prompt)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prompt", "completion"), [*PAIRS, *CROSSED])
def test_an_example_begins_with_what_inference_sends_and_reads_as_its_text(
    kind: str, prompt: str, completion: str
) -> None:
    tokenizer = made(kind)
    example = encode_example(TextEncoder(tokenizer, tokenizer.eos_token_id), prompt, completion)
    if prompt:
        assert list(example.input_ids[: example.prompt_length]) == encode_prompt(tokenizer, prompt)
    read, joined = (
        tokenizer.decode(list(ids), skip_special_tokens=True)
        for ids in (example.input_ids, plain(tokenizer, prompt + completion))
    )
    assert read == joined


def test_a_completion_is_tokenised_as_what_goes_on_where_a_token_would_cross() -> None:
    tokenizer = byte_level()
    encoder = TextEncoder(tokenizer, 2)
    assert tokenizer.convert_ids_to_tokens(plain(tokenizer, " Doctor")) == ["ĠDoctor"]
    assert encoder.completion("Answer: ", "Doctor") == [*plain(tokenizer, "Doctor"), 2]
    pieces = word_piece()
    ids = TextEncoder(pieces, 2).completion("play", "ing")
    assert pieces.convert_ids_to_tokens(ids)[0].startswith("##")
    spaced = metaspace("always")
    assert spaced.convert_ids_to_tokens(TextEncoder(spaced, 2).completion("Answer: ", "worker"))[0][0] != "▁"


def test_a_special_token_is_not_made_of_two_strings() -> None:
    for kind in KINDS:
        tokenizer = made(kind)
        assert tokenizer.eos_token_id not in TextEncoder(tokenizer, tokenizer.eos_token_id).completion("a<", "/s>")[:-1]


def test_an_unknown_token_takes_no_part_of_the_completion() -> None:
    tokenizer = word_piece()
    encoder, unknown = TextEncoder(tokenizer, 2), tokenizer.unk_token_id
    assert plain(tokenizer, "€bar play") == [unknown, *plain(tokenizer, "play")]
    assert encoder.completion("€", "bar play") == [*plain(tokenizer, ".bar play")[1:], 2]


def test_what_the_tokenizer_makes_nothing_of_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    encoder = TextEncoder(tokenizer, 2)
    for prompt in ("a", None):
        with pytest.raises(InputError, match="makes no token of it"):
            encode_example(encoder, prompt, " \n")


def test_a_prompt_of_white_space_is_none_that_inference_answers() -> None:
    encoder = TextEncoder(make_tokenizer(), 2)
    assert [encode_example(encoder, prompt, "a").has_prompt for prompt in ("", " \n", "q", None)] == [
        False,
        False,
        True,
        False,
    ]
    with pytest.raises(InputError, match="prompt 2 is empty"):
        encode_prompts(encoder, [("q", None), (" \n", None)], 9)


def test_prompts_are_named_by_their_place() -> None:
    encoder = TextEncoder(make_tokenizer(), 2)
    for text, message in (
        ("", "is empty"), ("\ud83d", "has half a character"), ("a" * 40, "has 41 tokens, the plan takes .* at most 9"),
        ("a" * 10_000_000, "has 10000000 characters, the plan takes"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"f.txt, line 3: the prompt {message}"):
            encode_prompts(encoder, [("ok", None), (text, "f.txt, line 3")], 9)
    assert has_half_characters("a\udcff") and not has_half_characters("a😀\0")


class _Counting:
    """Count the characters that a tokenizer is given."""

    def __init__(self) -> None:
        self.inner, self.most = make_tokenizer(), 0
        self.unk_token_id, self.get_vocab = None, self.inner.get_vocab

    def __call__(self, text: str, **options: Any) -> Any:
        self.most = max(self.most, len(text))
        return self.inner(text, **options)


def test_a_text_that_is_much_too_long_is_not_tokenised() -> None:
    counting = _Counting()
    encoder = TextEncoder(counting, 2)  # type: ignore[arg-type]
    with pytest.raises(InputError):
        encode_prompts(encoder, [("a" * 10_000_000, None)], 64)
    assert counting.most < 10
    assert encoder.takes("a" * (1 << 16), 64) and not encoder.takes("a" * ((1 << 21) + 1), 1 << 20)
