"""Answer a file of prompts; answers are kept as they come, so that an interrupted run goes on."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hecompile.errors import InputError
from hecompile.files import only_writer, reason_of, write_whole
from hecompile.foreign import printable
from hecompile.runtime.client.session import Session
from hecompile.runtime.inference.generation import Answer, CachedSteps, Sampling, generate
from hecompile.runtime.model.data import Example, encode_example, eos_and_pad
from hecompile.runtime.model.lines import parse_object, read_lines
from hecompile.runtime.model.tokens import TextEncoder, encode_prompts, has_half_characters
from hecompile.runtime.model.unknown_words import unknown_words

LOGGER = logging.getLogger(__name__)

JSON_SUFFIXES = (".jsonl", ".json")
_KEYS = ("prompt", "completion")
_LONGEST_KEY = 20


@dataclass(frozen=True)
class Prompt:
    """Hold a prompt, the completion that its answer is compared with, if there is one, and what an error calls it."""

    text: str
    completion: str | None = None
    where: str | None = field(default=None, compare=False)

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

    Blank lines are skipped. Raises InputError, naming file and line and no text, for what cannot be read.
    """
    lines = read_lines(path, "file of prompts")
    in_json = path.suffix in JSON_SUFFIXES
    prompts = [_parse(line, where) for where, line in lines] if in_json else plain_prompts(lines)
    if not prompts:
        raise InputError(f"{path} holds no prompt; give one per line, or JSON objects with prompt in a .jsonl file")
    return prompts


def plain_prompts(lines: Iterable[tuple[str, str]]) -> list[Prompt]:
    """Return a prompt per line, each line after its place. Raises InputError for a line with a NUL, which is no text."""
    prompts = [Prompt(line, where=where) for where, line in lines]
    for prompt in prompts:
        if "\0" in prompt.text:
            raise InputError(f"{prompt.where}: has a NUL, which is no text; save it as UTF-8")
    return prompts


def _parse(line: str, where: str) -> Prompt:
    record = parse_object(line, where, _KEYS)
    for key in record:
        # Other keys are left alone, as in training data; one that is misspelt would silently not be compared with.
        if key not in _KEYS and (near := difflib.get_close_matches(key[:_LONGEST_KEY], _KEYS, n=1, cutoff=0.8)):
            raise InputError(f"{where}: unknown key {key!r}; did you mean {near[0]}?")
    if not isinstance(record.get("prompt"), str):
        raise InputError(f"{where}: not a JSON object with a string prompt")
    completion = record.get("completion")
    if completion is not None and not isinstance(completion, str):
        raise InputError(f"{where}: completion must be a string, not {type(completion).__name__}")
    if completion == "":
        raise InputError(f"{where}: completion is an empty string; leave it out where there is nothing to compare with")
    return Prompt(record["prompt"], completion, where)


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
    the same call after an interruption goes on from it. Raises InputError for a prompt that has no token or too many, and
    for an `out` that exists, that has the unfinished answers of another call, or that another process writes.
    """
    sampling = sampling or Sampling()
    if out is None:
        return _infer(session, prompts, max_new_tokens, sampling, None, on_reply)
    require_free(out)
    with only_writer(out, f"--out {out}"):
        require_free(out)  # another call may have ended in between
        return _infer(session, prompts, max_new_tokens, sampling, out, on_reply)


def require_free(out: Path) -> None:
    """Raise InputError for a file of answers that exists: it may be the only copy."""
    if out.is_dir():
        raise InputError(f"{out} is a directory; name a file for the answers")
    if out.exists() or out.is_symlink():
        raise InputError(f"{out} exists; delete it, or give another --out")


def _infer(
    session: Session,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    sampling: Sampling,
    out: Path | None,
    on_reply: Callable[[int, Reply], None],
) -> list[Reply]:
    tokenizer = session.tokenizer
    eos, _ = eos_and_pad(tokenizer)
    ends = session.model.answer_ends | {eos}
    encoder, longest = TextEncoder(tokenizer, eos), session.model.sequence_buckets[-1]
    encoded = encode_prompts(encoder, [(prompt.text, prompt.where) for prompt in prompts], longest)
    for number, prompt in enumerate(prompts, start=1):
        if unknown := unknown_words(tokenizer, prompt.text):
            place = prompt.where or f"prompt {number}"
            LOGGER.warning("%s: the model's vocabulary has no %r", place, printable(unknown[0], 60))
    wanted = [_wanted(encoder, prompt, longest) for prompt in prompts]
    partial = None if out is None else _Partial(out, _fingerprint(session, prompts, max_new_tokens, sampling))
    replies = {} if partial is None else partial.read()
    for number, reply in sorted(replies.items()):
        on_reply(number, reply)
    missing = [number for number in range(len(prompts)) if number not in replies]

    def keep(index: int, answer: Answer) -> None:
        number = missing[index]
        replies[number] = _reply(wanted[number], answer, tokenizer, ends)
        if partial is not None:
            partial.add(number, replies[number])
        on_reply(number, replies[number])

    steps, left = CachedSteps(session.model), [encoded[number] for number in missing]
    # Numbered by the prompt's place, so that a run that goes on draws as one that did not stop.
    generate(session.model, steps, left, ends, max_new_tokens, sampling, keep, numbers=missing)
    ordered = [replies[number] for number in range(len(prompts))]
    if partial is not None:
        partial.finish(prompts, ordered)
    return ordered


def _wanted(encoder: TextEncoder, prompt: Prompt, longest: int) -> Example | None:
    """Return what the answer is compared with. Raises InputError for a completion that no answer can be."""
    if prompt.completion is None:
        return None
    try:
        if has_half_characters(prompt.completion):
            raise InputError("it has half a character")
        if not encoder.takes(prompt.completion, longest):
            raise InputError(
                f"it has {len(prompt.completion)} characters, the plan takes sequences of {longest} tokens"
            )
        return encode_example(encoder, prompt.text, prompt.completion)
    except InputError as error:
        raise InputError(f"{prompt.where or 'a prompt'}: the completion cannot be compared with: {error}") from None


def _reply(wanted: Example | None, answer: Answer, tokenizer: PreTrainedTokenizerBase, ends: Set[int]) -> Reply:
    text = str(tokenizer.decode(list(answer.tokens), skip_special_tokens=True))
    match = None if wanted is None else wanted.matches(answer.tokens, ends)
    return Reply(text, len(answer.tokens), answer.finish, match)


def _fingerprint(session: Session, prompts: Sequence[Prompt], max_new_tokens: int, sampling: Sampling) -> str:
    """Hash all that decides the answers, in hex: a partial file with another fingerprint holds other answers."""
    state = hashlib.sha256(session.bundle.plan_id.encode())
    asked = [{"text": prompt.text, "completion": prompt.completion} for prompt in prompts]
    state.update(json.dumps([max_new_tokens, asdict(sampling), asked]).encode())
    if others := session.model.answer_ends - {session.tokenizer.eos_token_id}:
        state.update(json.dumps(sorted(others)).encode())
    for name, value in sorted(session.model.adapter_state().items()):
        state.update(name.encode() + value.detach().contiguous().numpy().tobytes())
    return state.hexdigest()


class _Partial:
    """Keep the answers of a run that has not ended: a line with the fingerprint, then one per answer."""

    def __init__(self, out: Path, fingerprint: str) -> None:
        self._out, self._path, self._fingerprint = out, out.with_name(out.name + ".partial"), fingerprint

    def read(self) -> dict[int, Reply]:
        """Return what an interrupted run with this fingerprint has, by number; where there is none, begin the file.

        Raises InputError for the answers of another run, and where the file is damaged or cannot be written.
        """
        try:
            text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
            lines = text.split("\n")[:-1]
            if lines and json.loads(lines[0]) != self._fingerprint:
                raise InputError(
                    f"{self._path} has unfinished answers of another request (other prompts, options, plan or adapter): run "
                    f"that one again to go on, delete the file, or give another --out"
                )
            if lines:
                if not text.endswith("\n"):  # a line that a kill cut off: the next one must not continue it
                    write_whole(self._path, "".join(f"{line}\n" for line in lines).encode(), mode=0o600)
                records = [json.loads(line) for line in lines[1:]]
                return {record.pop("number"): Reply(**record) for record in records}
            self._out.parent.mkdir(parents=True, exist_ok=True)
            self._path.touch(mode=0o600)
            self._path.write_text(json.dumps(self._fingerprint) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot write the answers to {self._path}: {reason_of(error)}") from None
        except (ValueError, TypeError, KeyError, RecursionError):
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
