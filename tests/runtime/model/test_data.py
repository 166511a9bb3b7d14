from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from tokenizers import normalizers, processors

from hecompile.errors import InputError
from hecompile.runtime.model.data import IGNORED, PadToBucket, eos_and_pad, load_examples, smallest_bucket
from tests.support.training import BUCKETS, SECRET, make_tokenizer, write_jsonl

TOKENIZER = make_tokenizer()
BOS, EOS, PAD = 1, 2, 0


def test_the_loss_is_on_the_completion_and_eos_only(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "ab", "completion": "c", "id": 7}, {"text": "ab"}])
    first, second = load_examples(path, TOKENIZER, BUCKETS).examples
    a, b, c = (TOKENIZER.convert_tokens_to_ids(letter) for letter in "abc")
    assert first.input_ids == (BOS, a, b, c, EOS)
    assert first.labels == [IGNORED, IGNORED, IGNORED, c, EOS]
    assert second.input_ids == (BOS, a, b, EOS)
    assert second.labels == [IGNORED, a, b, EOS]
    assert (first.has_prompt, second.has_prompt) == (True, False)


def test_examples_do_not_show_their_tokens(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "ab", "completion": "c"}])
    assert repr(load_examples(path, TOKENIZER, BUCKETS).examples[0]) == "Example(5 tokens, 3 of them prompt)"


def test_a_tokenizer_that_adds_eos_itself_does_not_double_it_or_put_it_into_the_prompt(tmp_path: Path) -> None:
    records = [{"prompt": "ab", "completion": "c"}, {"text": "ab"}]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    expected = load_examples(path, TOKENIZER, BUCKETS).examples
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    assert tokenizer("ab")["input_ids"][-1] == EOS
    actual = load_examples(path, tokenizer, BUCKETS).examples
    assert [example.item() for example in actual] == [example.item() for example in expected]


def test_a_text_of_which_the_tokenizer_makes_nothing_is_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    with pytest.raises(InputError, match="line 1: the tokenizer makes no token of it"):
        load_examples(write_jsonl(tmp_path / "a.jsonl", [{"text": "  "}]), tokenizer, BUCKETS)


def test_lines_may_be_empty_and_strings_may_hold_unusual_line_separators(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"text": "a\u2028b"}\r\n\n{"text": "c"}', encoding="utf-8")
    assert len(load_examples(path, TOKENIZER, BUCKETS)) == 2


def test_the_ends_of_lines_are_no_text(tmp_path: Path) -> None:
    lines = [b'{"prompt": "ab", "completion": "c\\r\\n"}', b'{"text": "d\\u0000"}']
    path, digests = tmp_path / "a.jsonl", set()
    for end in (b"\n", b"\r\n", b"\r", b"\n \t\n\n"):
        for last in (b"", end):
            path.write_bytes(end.join(lines) + last)
            digests.add(load_examples(path, TOKENIZER, BUCKETS).digest)
    assert len(digests) == 1


def test_other_keys_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1, "prompt": "ab", "id": {"prompt": 1, "prompt": 2}, "x": "\\ud83d", "completion": "c"}')
    assert len(load_examples(path, TOKENIZER, BUCKETS)) == 1


def test_padding_is_on_the_right_to_the_smallest_bucket() -> None:
    items = [{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = PadToBucket((8, 4), PAD)(items)
    assert batch["input_ids"].tolist() == [[5, 6, 7, PAD], [8, PAD, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7, IGNORED], [8, IGNORED, IGNORED, IGNORED]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize(("length", "bucket"), [(1, 16), (16, 16), (17, 32), (32, 32)])
def test_smallest_bucket(length: int, bucket: int) -> None:
    assert smallest_bucket(length, (32, 16)) == bucket


def test_an_example_may_fill_the_largest_bucket_and_not_exceed_it(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b" * 29}])
    assert load_examples(path, TOKENIZER, BUCKETS).longest == 32
    write_jsonl(path, [{"text": "ok"}, {"prompt": SECRET, "completion": "b" * 23}])
    with pytest.raises(InputError) as caught:
        load_examples(path, TOKENIZER, BUCKETS)
    expected = "a.jsonl, line 2: prompt has 9 tokens and completion 23, with eos 33, over the limit of 32"
    assert expected in str(caught.value)
    assert SECRET not in str(caught.value)
    with pytest.raises(InputError, match="line 1: text has 3 tokens, with eos 4, over the limit of 3"):
        load_examples(path, TOKENIZER, BUCKETS, max_length=3)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "ab", "completion": "c"}])
    plain = load_examples(path, TOKENIZER, BUCKETS).digest
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_examples(path, TOKENIZER, BUCKETS).digest == plain


def test_a_long_line_has_one_message_and_no_warning_of_transformers_besides(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 8
    for record in ({"text": "a" * 40}, {"prompt": "a" * 40, "completion": "b" * 40}):
        with pytest.raises(InputError, match="over the limit of 32"):
            load_examples(write_jsonl(tmp_path / "a.jsonl", [record]), tokenizer, BUCKETS)
    assert not caplog.records


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f'{{"prompt": "{SECRET}"', "line 2: not valid JSON at column 22"),
        (f'["{SECRET}"]', "line 2: not a JSON object"),
        (f'{{"{SECRET}": 1}}', "line 2: the object lacks prompt and completion, or text"),
        (f'{{"prompt": "{SECRET}"}}', "line 2: the object lacks completion"),
        (f'{{"text": "{SECRET}", "prompt": "a"}}', "line 2: has text and also prompt or completion"),
        (f'{{"prompt": "{SECRET}", "completion": 3}}', "line 2: completion must be a string, not int"),
        (f'{{"prompt": "{SECRET}", "completion": ""}}', "line 2: completion is an empty string"),
        (f'{{"prompt": "{SECRET}", "completion": "\\ud83d"}}', "line 2: completion has half a character"),
        (f'{{"text": "{SECRET}", "text": "b"}}', "line 2: text is given 2 times"),
        (f'{{"text": "{SECRET}", "id": {"7" * 5000}}}', "line 2: a number has too many digits"),
        (f'{{"text": "{SECRET}", "id": {"[" * 100_000}', "line 2: lists or objects are nested too deeply"),
        ("[" * 100_000 + "]" * 100_000, "line 2: lists or objects are nested too deeply"),
        (f'{{"text": "{SECRET}\0"}}', "line 2: not valid JSON at column 19"),
        (f'{{"text": "{SECRET * 1_300_000}"}}', "line 2: text has 10400000 characters, over the limit of 32 tokens"),
    ],
    ids=lambda text: text[:40],
)
def test_a_bad_line_is_named_and_not_shown(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(InputError) as caught:
        load_examples(path, TOKENIZER, BUCKETS)
    assert message in str(caught.value)
    assert SECRET not in str(caught.value)
    # Nor in the traceback: the JSON decoder's own exception carries the line.
    assert caught.value.__context__ is None or caught.value.__suppress_context__


def test_missing_empty_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the dataset .*none\.jsonl does not exist"):
        load_examples(tmp_path / "none.jsonl", TOKENIZER, BUCKETS)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match=r"the dataset .*empty\.jsonl is empty"):
        load_examples(tmp_path / "empty.jsonl", TOKENIZER, BUCKETS)
    (tmp_path / "binary.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(InputError, match=r"binary\.jsonl is not UTF-8 text \(byte 10\)"):
        load_examples(tmp_path / "binary.jsonl", TOKENIZER, BUCKETS)
    (tmp_path / "binary.jsonl").write_bytes('{"text": "é"}\r\n'.encode() + b'{"text": "\xe9"}\n')
    with pytest.raises(
        InputError, match=r"binary\.jsonl is not UTF-8 text \(byte 26\): see line 2, and save it as UTF-8"
    ):
        load_examples(tmp_path / "binary.jsonl", TOKENIZER, BUCKETS)
    with pytest.raises(InputError, match=r"cannot read the dataset .*: embedded null byte"):
        load_examples("a\0b", TOKENIZER, BUCKETS)


def test_a_tokenizer_must_have_eos_and_need_not_have_padding() -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    assert eos_and_pad(tokenizer) == (EOS, EOS)
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no eos token"):
        eos_and_pad(tokenizer)
