"""Calibration text from a file: what is read, what is refused by name, and that the plan follows it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from hecompile.bundles.client import read_plan
from hecompile.bundles.kinds import CLIENT
from hecompile.compiler.calibration_file import read_samples
from hecompile.compiler.linear import compile_checkpoint
from hecompile.errors import InputError
from tests.support.tiny import OPTIONS
from tests.support.training import make_tokenizer


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_lines_and_objects_of_the_same_texts_give_the_same_sequences(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    plain = written(tmp_path / "a.txt", "one two\n\nthree four\n" * 9)
    lines = '{"text": "one two"}\n{"prompt": "three", "completion": " four", "other": 1}\n' * 9
    samples = read_samples(plain, tokenizer, 16)
    assert read_samples(written(tmp_path / "a.jsonl", lines), tokenizer, 16) == samples
    assert len(samples) == 8 and {len(sample) for sample in samples} == {16}
    assert {sample[0] for sample in samples} == {tokenizer.bos_token_id}
    text = tokenizer("one two", add_special_tokens=False)["input_ids"]
    assert list(samples[0][1 : len(text) + 2]) == [*text, tokenizer.eos_token_id]


def test_no_more_of_a_line_is_tokenised_than_is_wanted(tmp_path: Path) -> None:
    class Measuring:
        eos_token_id, bos_token_id, longest = 2, 1, 0

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            self.longest = max(self.longest, len(text))
            return {"input_ids": [5] * (len(text) // 4)}

    tokenizer = Measuring()
    samples = read_samples(written(tmp_path / "a.txt", "word" * 500_000), tokenizer, 16)  # type: ignore[arg-type]
    assert len(samples) == 8 and 0 < tokenizer.longest < 20_000


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    r"""JSON may hold U+2028 and U+0085 as they are; CR LF ends a line too."""
    tokenizer, text = make_tokenizer(), "a\u2028b\x85c " * 9
    path = written(tmp_path / "a.jsonl", json.dumps({"text": text}, ensure_ascii=False) + "\n")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert list(read_samples(path, tokenizer, 16)[0][1:]) == ids[:15]
    (tmp_path / "b.txt").write_bytes(b"one two\r\nthree four\r\n")
    assert read_samples(tmp_path / "b.txt", tokenizer, 16) == read_samples(
        written(tmp_path / "c.txt", "one two\nthree four\n"), tokenizer, 16
    )


def test_a_short_file_gives_fewer_sequences(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", "x" * 40)
    assert [len(sample) for sample in read_samples(path, make_tokenizer(), 16)] == [16, 16]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"short", r"a.txt has 6 tokens; calibration needs at least 15: give it more text"),
        ("a.txt", b"\xff", r"a.txt is not UTF-8 text \(byte 0\)"),
        ("a.jsonl", b'{"text": "a"}\n{', r"a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'{"prompt": "a"}', r"a.jsonl, line 1: wanted is an object"),
        ("a.jsonl", b'{"text": 3}', r"a.jsonl, line 1: wanted is an object"),
        ("a.jsonl", b"[1]", r"a.jsonl, line 1: wanted is an object"),
        ("a.jsonl", b'{"text": "a \\ud83d"}', r"a.jsonl, line 1: its text has half a character"),
        ("gone/a.txt", None, r"the calibration text .*gone"),
    ],
)
def test_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_samples(tmp_path / name, make_tokenizer(), 16)


@pytest.mark.usefixtures("quick_export")
def test_a_plan_is_calibrated_on_the_file(checkpoint: Path, tmp_path: Path) -> None:
    own = dataclasses.replace(OPTIONS, calibration=written(tmp_path / "a.txt", "the text of this file\n" * 60))
    first, second = (compile_checkpoint(str(checkpoint), tmp_path / name, own) for name in ("a", "b"))
    other = compile_checkpoint(str(checkpoint), tmp_path / "c", OPTIONS)
    assert first == second != other
    plans = [read_plan(tmp_path / name / CLIENT) for name in "ac"]
    assert plans[0].circuits.keys() == plans[1].circuits.keys()
    assert {circuit.weight_bits for circuit in plans[0].circuits.values()} == {10}
