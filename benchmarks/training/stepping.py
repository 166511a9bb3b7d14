"""Time whole training steps, encrypted and plaintext, in turn: client, worker and plaintext PEFT are a process each.

Each side runs `hecompile.runtime.training.train.run_training` for a few steps when told to, while the others wait, so that a
slow spell of the machine slows both. The first step of every round is not counted.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.processes import end_first, module_process, next_event
from benchmarks.timing import cpu_seconds, resident_bytes
from benchmarks.training.builds import Built
from benchmarks.training.training_process import Spec
from hecompile.bundles.client import MANIFEST
from hecompile.bundles.kinds import CLIENT, WORKER
from hecompile.errors import HecompileError
from hecompile.runtime.client.session import DEFAULT_ENGINE
from hecompile.runtime.training.metrics import read_metrics
from hecompile.runtime.worker.process import running_worker

_WORDS = ("the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not", "he")
_COSTS = ("client_crypto_seconds", "worker_seconds", "wire_seconds")


@dataclass(frozen=True)
class Batch:
    """Describe the batch of an optimizer step: `sequences` of exactly `length` tokens, in micro-batches of `micro_batch`."""

    sequences: int
    length: int
    micro_batch: int | None = None

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


@dataclass(frozen=True)
class Side:
    """Hold one side's rounds: the counted steps' records of metrics.jsonl, CPU seconds per step, peak resident bytes.

    parts: CPU seconds per step by part (`benchmarks.client.client_parts`), if they were asked for.
    """

    rounds: list[list[dict[str, Any]]]
    cpu_seconds: float
    peak: int
    first_loss: float
    parts: dict[str, float] = field(default_factory=dict)

    def median(self, *names: str) -> float:
        """Return the median over the counted steps of the sum of some figures."""
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
    """Compare both sides. `worker_cpu_seconds` are per step, `worker_peak` is in bytes."""

    encrypted: Side
    plaintext: Side
    worker_cpu_seconds: float
    worker_peak: int

    @property
    def ratio(self) -> float:
        """Return the median over the rounds of encrypted / plaintext seconds of a step."""
        pairs = zip(self.encrypted.rounds, self.plaintext.rounds, strict=True)
        return statistics.median(_seconds(own) / _seconds(plain) for own, plain in pairs)

    @property
    def split(self) -> dict[str, float]:
        """Split the seconds of an encrypted step by who spent them: medians, which need not add up to the whole."""
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


def measure_steps(built: Built, batch: Batch, rounds: int, steps: int, parts: bool = False) -> Steps:
    """Train `rounds` times `steps` + 1 steps on each side, in turn; `parts`: split their CPU seconds.

    Raises HecompileError when a process fails.
    """
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        worker, address = stack.enter_context(running_worker(built.build / WORKER, ("--engine", DEFAULT_ENGINE)))
        end_first(worker.pid)
        recipes = _write_recipes(scratch, built, batch, steps + 1)
        specs = {
            "encrypted": _spec(built, recipes["encrypted"], address, parts),
            "plaintext": _spec(built, recipes["plaintext"], None, parts),
        }
        trainers = {
            name: stack.enter_context(_trainer(spec.save(scratch / f"{name}.json"))) for name, spec in specs.items()
        }
        answers: dict[str, list[_Round]] = {name: [] for name in trainers}
        used = []
        for _ in range(rounds):
            for name, process in trainers.items():
                before = cpu_seconds(worker.pid)
                answers[name].append(_train_round(process))
                if name == "encrypted":
                    used.append((cpu_seconds(worker.pid) - before) / (steps + 1))
        peak = resident_bytes(worker.pid)[1]
    return Steps(_side(answers["encrypted"]), _side(answers["plaintext"]), statistics.median(used), peak)


@dataclass(frozen=True)
class _Round:
    """Hold what a trainer answers after a round: the records of all its steps, CPU seconds, peak resident bytes, parts."""

    steps: list[dict[str, Any]]
    cpu_seconds: float
    peak: int
    parts: dict[str, float]


def _side(answers: list[_Round]) -> Side:
    return Side(
        rounds=[answer.steps[1:] for answer in answers],
        cpu_seconds=statistics.median(answer.cpu_seconds / len(answer.steps) for answer in answers),
        peak=max(answer.peak for answer in answers),
        first_loss=answers[0].steps[0]["loss"],
        parts={
            name: statistics.median(answer.parts[name] / len(answer.steps) for answer in answers)
            for name in answers[0].parts
        },
    )


def _spec(built: Built, recipe: Path, worker: str | None, parts: bool) -> Spec:
    plan = json.loads((built.build / CLIENT / MANIFEST).read_text(encoding="utf-8"))["plan"]
    shape = {key: plan[key] for key in ("sequence_buckets", "batch_size")}
    return Spec(str(recipe), str(built.checkpoint), worker, plan["lora"], **shape, parts=parts)


def _write_recipes(scratch: Path, built: Built, batch: Batch, steps: int) -> dict[str, Path]:
    """Write the data, and a recipe for each side; they differ in the directory they write to."""
    tokenizer = AutoTokenizer.from_pretrained(built.checkpoint)
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
            "model": str(built.build / CLIENT),
            "worker": "tcp://127.0.0.1:1",  # each process is told the real one
            "data": {"train_file": str(scratch / "data.jsonl")},
            "training": training,
        }
        paths[name] = scratch / f"{name}.yaml"
        paths[name].write_text(yaml.safe_dump(document), encoding="utf-8")
    return paths


def text_of_length(tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> str:
    """Write a text of exactly `length` tokens with eos. Raises HecompileError where the words do not add up to it."""

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
def _trainer(spec: Path) -> Iterator[subprocess.Popen[str]]:
    with module_process("benchmarks.training.training_process", str(spec)) as process:
        next_event(process, "ready")
        yield process


def _train_round(trainer: subprocess.Popen[str]) -> _Round:
    assert trainer.stdin is not None
    trainer.stdin.write("go\n")
    trainer.stdin.flush()
    answer = next_event(trainer, "round")
    parts = json.loads(answer["parts"])
    return _Round(read_metrics(Path(answer["metrics"])), answer["cpu_seconds"], answer["peak"], parts)
