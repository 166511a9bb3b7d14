"""Whole training steps, encrypted and plaintext, in turn: three processes (client, worker, plaintext PEFT) on one machine.

Each side runs `hecompile.runtime.training.train.run_training` for a few steps when told to, while the others wait, so that a
slow spell of the machine slows both. The first step of every round is not counted.
"""

from __future__ import annotations

import contextlib
import json
import select
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.report import ROOT
from benchmarks.timing import available_bytes, cpu_seconds, resident_bytes
from benchmarks.training.training_process import Spec
from hecompile.bundles.client import MANIFEST
from hecompile.bundles.kinds import CLIENT, WORKER
from hecompile.errors import HecompileError
from hecompile.runtime.client.session import DEFAULT_ENGINE
from hecompile.runtime.wire.events import read_event
from hecompile.runtime.worker.process import serve_command, stop_process

_WORDS = ("the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not", "he")
_COSTS = ("client_crypto_seconds", "worker_seconds", "wire_seconds")
_POLL_SECONDS, _LEAST_MEMORY = 0.25, 2 * 10**9


@dataclass(frozen=True)
class Batch:
    """What one optimizer step is made of: `sequences` of exactly `length` tokens, in micro-batches of `micro_batch`."""

    sequences: int
    length: int
    micro_batch: int | None = None

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


@dataclass(frozen=True)
class Side:
    """One side's rounds: the counted steps' records of metrics.jsonl per round, CPU seconds per step, resident bytes."""

    rounds: list[list[dict[str, Any]]]
    cpu_seconds: float
    peak: int
    first_loss: float

    def median(self, *names: str) -> float:
        """Median over the counted steps of the sum of some figures."""
        return statistics.median(sum(step[name] for name in names) for steps in self.rounds for step in steps)

    @property
    def seconds(self) -> float:
        return self.median("seconds")

    def per_token(self, *names: str) -> float:
        return sum(step[name] for steps in self.rounds for step in steps for name in names) / sum(
            step["tokens"] for steps in self.rounds for step in steps
        )


@dataclass(frozen=True)
class Steps:
    """A comparison: `worker_cpu_seconds` per step, `worker_peak` in bytes, ratio: median over rounds of the pair's."""

    encrypted: Side
    plaintext: Side | None
    worker_cpu_seconds: float
    worker_peak: int

    @property
    def ratio(self) -> float:
        assert self.plaintext is not None
        pairs = zip(self.encrypted.rounds, self.plaintext.rounds, strict=True)
        return statistics.median(_seconds(own) / _seconds(plain) for own, plain in pairs)

    @property
    def split(self) -> dict[str, float]:
        """Seconds of an encrypted step by who spent them (medians, which need not add up to the whole)."""
        whole = [step for steps in self.encrypted.rounds for step in steps]
        rest = statistics.median(step["seconds"] - sum(step[name] for name in _COSTS) for step in whole)
        return {
            "client cryptography": self.encrypted.median("client_crypto_seconds"),
            "client model and optimizer": rest,
            "worker": self.encrypted.median("worker_seconds"),
            "wire": self.encrypted.median("wire_seconds"),
        }


def _seconds(steps: Sequence[dict[str, Any]]) -> float:
    return statistics.median(step["seconds"] for step in steps)


def measure_steps(
    build: Path,
    checkpoint: Path,
    batch: Batch,
    rounds: int,
    steps: int,
    plaintext: bool = True,
    engine: str = DEFAULT_ENGINE,
) -> Steps:
    """Train `rounds` times `steps` + 1 steps on each side, in turn. Raises HecompileError when a process fails."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        plan = json.loads((build / CLIENT / MANIFEST).read_text(encoding="utf-8"))["plan"]
        recipe = _write_recipe(scratch, build, checkpoint, batch, steps + 1)
        worker, address = stack.enter_context(serving(build / WORKER, engine))
        shape = {key: plan[key] for key in ("sequence_buckets", "batch_size")}
        sides = {"encrypted": address} | ({"plaintext": None} if plaintext else {})
        processes = {}
        for name, worker_address in sides.items():
            spec = Spec(str(recipe[name]), str(checkpoint), worker_address, plan["lora"], **shape)
            processes[name] = stack.enter_context(_trainer(spec.save(scratch / f"{name}.json")))
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in processes}
        used = []
        for _ in range(rounds):
            for name, process in processes.items():
                before = cpu_seconds(worker.pid)
                answers[name].append(_round(process))
                if name == "encrypted":
                    used.append((cpu_seconds(worker.pid) - before) / (steps + 1))
        peak = resident_bytes(worker.pid)[1]
    found = {name: _side(rounds_of_side) for name, rounds_of_side in answers.items()}
    return Steps(found["encrypted"], found.get("plaintext"), statistics.median(used), peak)


def _side(answers: list[dict[str, Any]]) -> Side:
    return Side(
        rounds=[answer["steps"][1:] for answer in answers],
        cpu_seconds=statistics.median(answer["cpu_seconds"] / len(answer["steps"]) for answer in answers),
        peak=max(answer["peak"] for answer in answers),
        first_loss=answers[0]["steps"][0]["loss"],
    )


def _write_recipe(scratch: Path, build: Path, checkpoint: Path, batch: Batch, steps: int) -> dict[str, Path]:
    """The data and a recipe for each side, which differ in the directory they write to."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    lines = [json.dumps({"text": text_of_length(tokenizer, batch.length, seed)}) for seed in range(batch.sequences)]
    (scratch / "data.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    micro = batch.micro_batch or batch.sequences
    paths = {}
    for name in ("encrypted", "plaintext"):
        training = {
            "output_dir": str(scratch / name),
            "overwrite_output_dir": True,
            "max_steps": steps,
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": batch.sequences // micro,
            "learning_rate": 1e-4,
            "save_strategy": "no",
            "disable_tqdm": True,
            "seed": 1,
        }
        document = {
            "model": str(build / CLIENT),
            "worker": "tcp://127.0.0.1:1",  # each process is told the real one
            "data": {"train_file": str(scratch / "data.jsonl")},
            "training": training,
        }
        paths[name] = scratch / f"{name}.yaml"
        paths[name].write_text(yaml.safe_dump(document), encoding="utf-8")
    return paths


def text_of_length(tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> str:
    """A text that makes `length` tokens with eos. Raises HecompileError where the words do not add up to it."""

    def count(words: list[str]) -> int:
        return len(tokenizer(" ".join(words), verbose=False)["input_ids"]) + 1  # with eos

    words: list[str] = []
    for index in range(length):
        candidate = [*words, _WORDS[(index * (seed + 3) + seed) % len(_WORDS)]]
        if count(candidate) > length:
            break
        words = candidate
    while count(words) < length:
        words.append("a")
    if count(words) != length:
        raise HecompileError(f"no text of {length} tokens: one of {count(words)} was made")
    return " ".join(words)


@contextmanager
def serving(
    bundle: Path, engine: str, listen: str = "tcp://127.0.0.1:0"
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A worker process and its address. Raises HecompileError when it does not start."""
    with _process([*serve_command(bundle), "--listen", listen, "--engine", engine]) as process:
        event = read_event(line := _line(process))
        if event is None or event["event"] != "listening":
            raise HecompileError(f"the worker process did not start: {line!r}")
        yield process, event["address"]


@contextmanager
def _trainer(spec: Path) -> Iterator[subprocess.Popen[str]]:
    with _process([sys.executable, "-m", "benchmarks.training.training_process", str(spec)]) as process:
        _line(process)  # ready
        yield process


def _round(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    answer: dict[str, Any] = json.loads(_line(process))
    return answer


def _line(process: subprocess.Popen[str]) -> str:
    """The next line, of which there is never more than one. Gives up before the machine has no memory left."""
    assert process.stdout is not None
    while not select.select([process.stdout], [], [], _POLL_SECONDS)[0]:
        if available_bytes() < _LEAST_MEMORY:
            raise HecompileError(
                f"only {available_bytes() / 1e9:.1f} GB of memory are left: stopped. Free some, or measure a smaller model"
            )
    line = process.stdout.readline()
    if not line:
        raise HecompileError(f"a benchmark process ended early with status {process.wait()}; its messages are above")
    return line


@contextmanager
def _process(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with contextlib.suppress(OSError):  # if memory runs out all the same, it is these processes that end, and no others
        Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000", encoding="utf-8")
    try:
        yield process
    finally:
        stop_process(process)
