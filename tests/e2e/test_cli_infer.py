"""`hecompile infer` on the command line: answers, files, what a request carries, and one clear error for bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import Tensor
from typer.testing import CliRunner

from hecompile.cli.main import app
from hecompile.errors import HecompileError
from hecompile.runtime.inference.answers import Prompt, read_prompts
from hecompile.runtime.inference.generation import CachedSteps
from hecompile.runtime.model.adapter import save_adapter
from tests.e2e.conftest import Build

LIMIT = ["--max-new-tokens", "3"]


@pytest.fixture
def adapter_directory(build: Build, adapter: dict[str, Tensor], tmp_path: Path) -> Path:
    model = build.encrypted()
    model.load_adapter_state(adapter)
    return save_adapter(model, tmp_path / "adapter")


def infer(build: Build, *arguments: str, stdin: str | None = None) -> str:
    """Return what is printed. Raises the command's error."""
    client, worker = str(build.client.directory), str(build.worker.directory)
    place = [] if "--worker" in arguments else ["--worker-bundle", worker, "--engine", "torch"]
    result = CliRunner().invoke(app, ["infer", client, *place, *LIMIT, *arguments], input=stdin, catch_exceptions=True)
    if result.exception is not None:
        raise result.exception
    return result.output


def test_answers_to_the_screen_and_to_a_file(build: Build, adapter_directory: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Question: Who", "completion": "x"}\n{"prompt": "The"}\n')
    out = tmp_path / "out.jsonl"
    options = ("--adapter", str(adapter_directory))
    assert "exact match: 0 of 1" in infer(build, *options, "--prompts-file", str(prompts), "--out", str(out))
    first, second = (json.loads(line) for line in out.read_text().splitlines())
    assert (first["prompt"], second["prompt"]) == ("Question: Who", "The")
    assert first["match"] is False and "match" not in second
    # The screen shows the prompt only where there are several, from arguments and from standard input alike.
    from_stdin = infer(build, *options, "--prompts-file", "-", stdin="Question: Who\n\nThe\n")
    assert f"Question: Who\t{first['answer']}" in from_stdin and f"The\t{second['answer']}" in from_stdin
    assert f"{second['answer']}\n" in infer(build, *options, "The")


def test_a_token_costs_one_row_of_every_circuit_whatever_came_before(build: Build) -> None:
    """Bytes of whole frames: the payload of a token forward, and at most a kilobyte of frame for each circuit."""
    model = build.encrypted("torch")
    steps = CachedSteps(model)
    steps.next_logits({0: [1] + [70] * 30, 1: [1, 90, 80]})
    forward = [p for name, p in model.bundle.circuits.items() if name.endswith(".forward")]
    payload = sum(p.bytes_up(1) + p.bytes_down(1) for p in forward)
    for sequences in ({0: [71], 1: [72]}, {1: [73]}):
        before = model.stats()
        steps.next_logits(sequences)
        used = {name: value - before[name] for name, value in model.stats().items()}
        assert used["tokens"] == len(sequences)
        frames = used["bytes_up"] + used["bytes_down"] - payload * len(sequences)
        assert 0 <= frames < 1000 * len(forward)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give prompts as arguments or in --prompts-file"),
        (("A", "--prompts-file", "-"), "one or the other"),
        (("word " * 90,), "tokens, the plan takes sequences of at most 64"),
        (("A", " "), "prompt 2 is empty"),
        (("A", "caf\udce9"), "prompt 2 has half a character, or a byte that is not UTF-8"),
        (("A", "--worker", "tcp://127.0.0.1:9", "--attempts", "1"), "127.0.0.1:9"),
        (("A", "--attempts", "0"), "attempts"),
        (("A", "--worker", "tpc://127.0.0.1:9"), "tpc"),
        (("A", "--worker", "tcp://127.0.0.1:9", "--engine", "torch"), "engine is the worker's own choice"),
        (("A", "--engine", "abacus"), "engine"),
        (("A", "--on-bad-worker", "ignore"), "on_bad_worker"),
        (("A", "--adapter", "{tmp}/none"), "none does not exist"),
        (("A", "--temperature", "-1"), "temperature must be"),
        (("A", "--prompts-file", "{tmp}/none.txt"), "one or the other"),
        (("--prompts-file", "{tmp}/none.txt"), "none.txt does not exist"),
    ],
)
def test_bad_input(build: Build, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    given = [part.format(tmp=tmp_path) for part in arguments]
    with pytest.raises(HecompileError) as caught:
        infer(build, *given, stdin="")
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_bytes_of_another_encoding_on_standard_input(build: Build) -> None:
    command = ["infer", str(build.client.directory), "--worker", "tcp://127.0.0.1:9", "--prompts-file", "-"]
    result = CliRunner().invoke(app, command, input=b"One\ncaf\xe9\n")
    assert isinstance(result.exception, HecompileError)
    assert "standard input is not UTF-8 text (byte 7): see line 2" in str(result.exception)


def test_a_prompt_of_a_file_is_named_by_its_line(build: Build, tmp_path: Path) -> None:
    for name, content in (("p.txt", "A\n\n" + "word " * 90), ("p.jsonl", '{"prompt": "A"}\n\n{"prompt": " "}\n')):
        (tmp_path / name).write_text(content)
        with pytest.raises(HecompileError, match=rf"{name}, line 3: the prompt (has \d+ tokens|is empty)"):
            infer(build, "--prompts-file", str(tmp_path / name))


def test_a_misspelt_key_is_refused_and_others_are_left_alone(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "A", "completions": "x"}\n')
    with pytest.raises(HecompileError, match="line 1: unknown key 'completions'; did you mean completion"):
        read_prompts(prompts)
    prompts.write_text('{"prompt": "A", "id": 7}\n')
    assert read_prompts(prompts) == [Prompt("A")]


def test_an_adapter_of_another_model_is_refused(build: Build, adapter_directory: Path) -> None:
    path = adapter_directory / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"r": 4}))
    with pytest.raises(HecompileError, match="r is 4 but the model's is 8"):
        infer(build, "A", "--adapter", str(adapter_directory))


def test_no_worker_named(build: Build) -> None:
    result = CliRunner().invoke(app, ["infer", str(build.client.directory), "The"])
    assert isinstance(result.exception, HecompileError)
    assert "--worker, an address, or --worker-bundle" in str(result.exception)
