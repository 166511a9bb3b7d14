"""Standard output that has not all characters, or takes no more, ends in one line; several answers can be taken apart."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hecompile.cli.prompts import print_answer
from hecompile.runtime.inference.answers import Prompt
from hecompile.runtime.inference.generation import Sampling

ANSWER = """
from hecompile.cli.output import prepare_output
from hecompile.cli.prompts import print_answer
from hecompile.runtime.inference.answers import Prompt
prepare_output()
print_answer([Prompt("a")], 0, "caf\\u00e9 \\ud83d")
"""


def run(command: list[str], output: object = subprocess.PIPE, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], stdout=output, stderr=subprocess.PIPE, text=True, timeout=120,  # type: ignore[call-overload]
        env=os.environ | environment, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--version"], ["export", "llama", "--help"]])
def test_a_full_disk_behind_standard_output_is_one_line(arguments: list[str], unbuffered: str) -> None:
    with Path("/dev/full").open("w") as full:
        ended = run(["-m", "hecompile.cli", *arguments], full, PYTHONUNBUFFERED=unbuffered)
    assert ended.returncode == 2
    assert ended.stderr == "error: cannot write to standard output: No space left on device\n"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"PYTHONIOENCODING": "ascii"}, "caf\\xe9 \\ud83d\n"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "caf\\xe9 \\ud83d\n"),
        ({"PYTHONIOENCODING": "utf-8"}, "caf\u00e9 \\ud83d\n"),
    ],
)
def test_a_character_that_the_terminal_has_not_is_escaped(environment: dict[str, str], expected: str) -> None:
    ended = run(["-c", ANSWER], **environment)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == expected


def test_several_answers_are_one_line_each_with_one_tab(capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [Prompt("a\tb\\"), Prompt("c")]
    print_answer(prompts, 0, "one\ntwo\r\tthree")
    print_answer(prompts[:1], 0, "one\ntwo\tthree")
    assert capsys.readouterr().out == "a\\tb\\\\\tone\\ntwo\\r\\tthree\none\ntwo\tthree\n"


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-38, 1e-8, 1e300])
def test_any_temperature_draws_a_token(temperature: float) -> None:
    logits = torch.tensor([-1e30, 2.0, 2.5, -3.0])
    sampling = Sampling(temperature=temperature)
    token = sampling.choose(logits, sampling.generator(0))
    assert token == 2 or temperature > 1
