"""Answer a file of prompts; answers are kept as they come, so that an interrupted run goes on."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hecompile.errors import InputError
from hecompile.files import reason_of, write_whole
from hecompile.runtime.client.session import Session
from hecompile.runtime.inference.generation import Answer, CachedSteps, Sampling, generate
from hecompile.runtime.model.data import encode_prompt, eos_and_pad

JSON_SUFFIXES = (".jsonl", ".json")
_KEYS = ("prompt", "completion")


@dataclass(frozen=True)
class Prompt:
    """Hold a prompt, and the completion that its answer is compared with, if there is one."""

    text: str
    completion: str | None = None

    def __repr__(self) -> str:
        return f"Prompt({len(self.text)} characters)"


@dataclass(frozen=True)
class Reply:
    """Hold the answer to one prompt. match: whether it is the completion, None where there was none."""

    answer: str
    tokens: int
    finish: str
    match: bool | None = None

    def __repr__(self) -> str:
        return f"Reply({self.tokens} tokens, {self.finish})"


def read_prompts(path: Path) -> list[Prompt]:
    """Read the prompts of a file: JSONL objects with `prompt` (and `completion`), or one prompt per line of any other file.

    Empty lines are skipped. Raises InputError, naming file and line and no text, for what cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise InputError(f"cannot read the prompts in {path}: {reason_of(error)}") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if path.suffix in JSON_SUFFIXES:
        prompts = [_parse(line, f"{path}, line {number}") for number, line in lines]
    else:
        prompts = [Prompt(line.rstrip("\r")) for _, line in lines]
    if not prompts:
        raise InputError(f"{path} holds no prompt; give one per line, or JSON objects with prompt in a .jsonl file")
    return prompts


def _parse(line: str, where: str) -> Prompt:
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON at column {error.colno}") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: not a JSON object with a string prompt")
    for key in record:
        # Other keys are left alone, as in training data; one that is misspelt would silently not be compared with.
        if key not in _KEYS and (near := difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.8)):
            raise InputError(f"{where}: unknown key {key!r}; did you mean {near[0]}?")
    if not isinstance(record.get("prompt"), str):
        raise InputError(f"{where}: not a JSON object with a string prompt")
    completion = record.get("completion")
    if completion is not None and not isinstance(completion, str):
        raise InputError(f"{where}: completion must be a string, not {type(completion).__name__}")
    return Prompt(record["prompt"], completion)


def infer(
    session: Session,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    out: Path | None = None,
    on_reply: Callable[[int, Reply], None] = lambda number, reply: None,
) -> list[Reply]:
    """Answer `prompts` by the session's model, in their order; `on_reply` is called with each as soon as it is there.

    With `out`, a JSONL file is written at the end, at once; meanwhile `<out>.partial` holds the answers that are there, and
    the same call after an interruption goes on from it. Raises InputError for a prompt that has no token or too many.
    """
    sampling, tokenizer = sampling or Sampling(), session.tokenizer
    eos, _ = eos_and_pad(tokenizer)
    encoded = _encode(prompts, tokenizer)
    partial = None if out is None else _Partial(out, _fingerprint(session, prompts, max_new_tokens, sampling))
    replies = {} if partial is None else partial.read()
    for number, reply in sorted(replies.items()):
        on_reply(number, reply)
    missing = [number for number in range(len(prompts)) if number not in replies]

    def keep(index: int, answer: Answer) -> None:
        number = missing[index]
        replies[number] = _reply(prompts[number], answer, tokenizer, eos)
        if partial is not None:
            partial.add(number, replies[number])
        on_reply(number, replies[number])

    steps, left = CachedSteps(session.model), [encoded[number] for number in missing]
    # Numbered by the prompt's place, so that a run that goes on draws as one that did not stop.
    generate(session.model, steps, left, eos, max_new_tokens, sampling, keep, numbers=missing)
    ordered = [replies[number] for number in range(len(prompts))]
    if partial is not None:
        partial.finish(prompts, ordered)
    return ordered


def _encode(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.text.strip():
            raise InputError(f"prompt {number} is empty; give some text")
    return [encode_prompt(tokenizer, prompt.text) for prompt in prompts]


def _reply(prompt: Prompt, answer: Answer, tokenizer: PreTrainedTokenizerBase, eos: int) -> Reply:
    text = str(tokenizer.decode(list(answer.tokens), skip_special_tokens=True))
    match = None
    if prompt.completion is not None:
        completion = tokenizer(prompt.completion, add_special_tokens=False, verbose=False)["input_ids"]
        match = list(answer.tokens) == [*completion, eos]
    return Reply(text, len(answer.tokens), answer.finish, match)


def _fingerprint(session: Session, prompts: Sequence[Prompt], max_new_tokens: int, sampling: Sampling) -> str:
    """Hash all that decides the answers, in hex: a partial file with another fingerprint holds other answers."""
    state = hashlib.sha256(session.bundle.plan_id.encode())
    state.update(json.dumps([max_new_tokens, asdict(sampling), [asdict(prompt) for prompt in prompts]]).encode())
    for name, value in sorted(session.model.adapter_state().items()):
        state.update(name.encode() + value.detach().contiguous().numpy().tobytes())
    return state.hexdigest()


class _Partial:
    """Keep the answers of a run that has not ended: a line with the fingerprint, then one per answer."""

    def __init__(self, out: Path, fingerprint: str) -> None:
        if out.is_dir():
            raise InputError(f"{out} is a directory; name a file for the answers")
        self._out, self._path, self._fingerprint = out, out.with_name(out.name + ".partial"), fingerprint

    def read(self) -> dict[int, Reply]:
        """Return what an interrupted run with this fingerprint has, by number; without one, begin the file anew."""
        try:
            lines = self._path.read_text(encoding="utf-8").split("\n")[:-1] if self._path.exists() else []
            if lines and json.loads(lines[0]) == self._fingerprint:
                records = [json.loads(line) for line in lines[1:]]
                return {record.pop("number"): Reply(**record) for record in records}
            self._out.parent.mkdir(parents=True, exist_ok=True)
            self._path.touch(mode=0o600)
            self._path.write_text(json.dumps(self._fingerprint) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot write the answers to {self._path}: {reason_of(error)}") from None
        except (ValueError, TypeError, KeyError):
            raise InputError(f"{self._path} is damaged: delete it, or give another --out") from None
        return {}

    def add(self, number: int, reply: Reply) -> None:
        """Append the answer to a prompt. Raises InputError where the file cannot be written."""
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"number": number, **asdict(reply)}) + "\n")
        except OSError as error:
            raise InputError(
                f"cannot write to {self._path}: {reason_of(error)}. Make room; the same command goes on from there"
            ) from None

    def finish(self, prompts: Sequence[Prompt], replies: Sequence[Reply]) -> None:
        """Write the file of all answers at once, and delete this one. Raises InputError where it cannot be written."""
        records = []
        for prompt, reply in zip(prompts, replies, strict=True):
            record = {"prompt": prompt.text, **asdict(reply)}
            if prompt.completion is None:
                del record["match"]
            records.append(json.dumps(record, ensure_ascii=False) + "\n")
        try:
            write_whole(self._out, "".join(records).encode())
            self._path.unlink()
        except OSError as error:
            raise InputError(
                f"cannot write the answers to {self._out}: {reason_of(error)}. They are in {self._path}: make room, and the "
                "same command goes on from there"
            ) from None
