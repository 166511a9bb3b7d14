"""What YAML takes without a word, or with an error of Python's own, is one error here."""

from __future__ import annotations

from pathlib import Path

import pytest

from hecompile.errors import InputError
from hecompile.runtime.recipes.training import load_recipe
from hecompile.runtime.recipes.yaml_text import MAX_BYTES, parse_yaml, read_yaml

BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:\n  " + "[" * 100_000, "nested too deeply .* line 2"),
        ("- " * 100_000, "nested too deeply .* line 1"),
        ("{a: " * 60_000, "nested too deeply .* line 1"),
        (BOMB, "stands for more than 100000 others .* line 6"),
        ("a: 1\nb: &x [*x]", "a value that holds itself .* line 2"),
        ("a: &x {b: {c: *x}}", "a value that holds itself .* line 1"),
        ("a: 1\nb: {c: 1, c: 2}", "repeated or non-text key 'c' .* line 2"),
        ("a: 1\nb: " + "7" * 5000, "a value that cannot be read; put text in quotes .* line 2"),
        ("a: 2024-99-99", "a value that cannot be read; put text in quotes .* line 1"),
        ('a: !!int ""', "a value that cannot be read"),
        ("a: !!bool perhaps", "a value that cannot be read"),
        ("a: !!timestamp soon", "a value that cannot be read"),
        ('a: "x\\0y"', "a NUL or half a character .* line 1"),
        ('a: "\\ud83d"', "a NUL or half a character .* line 1"),
        ("a: x\0y", "special characters are not allowed"),
        ("a: \udce9", "special characters are not allowed"),
    ],
    ids=lambda text: text[:20],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=f"r.yaml is not valid YAML: .*{message}"):
        parse_yaml(text, "r.yaml")


def test_aliases_are_taken() -> None:
    assert parse_yaml("\ufeffa: &x {b: [1, 1.5]}\nc: *x", "r.yaml") == {"a": {"b": [1, 1.5]}, "c": {"b": [1, 1.5]}}
    assert parse_yaml("", "r.yaml") is None


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    for content, message in (
        (b"a: 1\nb: caf\xe9\n", r"cannot read it: not UTF-8 \(line 2\)"),
        (b"a: " + b"x" * MAX_BYTES, "it has more than 262144 bytes"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_yaml(path, "it")
    with pytest.raises(InputError, match="cannot read it: Is a directory"):
        read_yaml(tmp_path, "it")
    with pytest.raises(InputError, match="cannot read it: embedded null byte"):
        read_yaml(Path("a\0b"), "it")


@pytest.mark.parametrize("value", ["[" * 1000, "{a: 1, a: 2}", "2024-99-99", "caf\udce9", '"\\0"', "&x [*x]"])
def test_overrides_are_read_as_recipes_are(tmp_path: Path, value: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: m\nworker_bundle: w\ndata: {train_file: t}\ntraining: {output_dir: o}\n")
    with pytest.raises(InputError, match=r"^override training\.seed: the value is not valid YAML"):
        load_recipe(path, [f"training.seed={value}"])
    with pytest.raises(InputError):
        load_recipe(path, [".".join(["training"] * 20_000) + "=1"])
