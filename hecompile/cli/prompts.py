"""Take prompts from the command line and print answers to them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hecompile.errors import InputError

if TYPE_CHECKING:  # imported when a command runs: help is to be quick
    from hecompile.runtime.inference.answers import Prompt

_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})
Prompts = Annotated[list[str] | None, typer.Argument(help="Prompts, each in quotes.")]
PromptsFile = Annotated[
    Path | None,
    typer.Option(
        help="One prompt per line, or a .jsonl file of objects with prompt (and completion, which the answer is then "
        "compared with). - reads lines from standard input."
    ),
]


def gather_prompts(prompts: Sequence[str] | None, file: Path | None) -> list[Prompt]:
    """Return the prompts of the command line, or those of a file or of standard input.

    Raises InputError where both or neither are given, where the file cannot be read and where there is no prompt.
    """
    from hecompile.runtime.inference.answers import Prompt, plain_prompts, read_prompts
    from hecompile.runtime.model.lines import split_lines

    if bool(prompts) == (file is not None):
        raise InputError("give prompts as arguments or in --prompts-file, one or the other")
    if file is None:
        return [Prompt(text) for text in prompts or ()]
    if str(file) != "-":
        return read_prompts(file)
    # Its bytes: the text layer would guess another encoding than that of a file.
    lines = plain_prompts(split_lines(sys.stdin.buffer.read(), "standard input"))
    if not lines:
        raise InputError("standard input holds no prompt; give one per line")
    return lines


def print_answer(prompts: Sequence[Prompt], number: int, answer: str) -> None:
    """Print the answer to a prompt; where there are several prompts, as a line with the prompt and a tab before it.

    Tabs, ends of lines and backslashes of their own are then written as in C, so that the line can be taken apart.
    """
    print(f"{_in_one_line(prompts[number].text)}\t{_in_one_line(answer)}" if len(prompts) > 1 else answer, flush=True)


def _in_one_line(text: str) -> str:
    return text.translate(_ESCAPES)
