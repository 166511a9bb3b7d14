"""A process that trains when told to: a round of steps for each line on its standard input, one JSON line for each answer.

    python -m benchmarks.training.training_process SPEC.json

Started by `benchmarks.training.stepping`. It runs `hecompile.runtime.training.train.run_training`, on the encrypted
model over a worker's address or on plaintext PEFT, and answers with the records of metrics.jsonl, its CPU seconds and
its resident memory. """

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import peft
import transformers
from transformers import PreTrainedTokenizerBase

from benchmarks.timing import resident_bytes
from hecompile.runtime.client.session import open_session
from hecompile.runtime.model.adapter import AdapterModel
from hecompile.runtime.model.plaintext import PlaintextPeftModel
from hecompile.runtime.recipes.training import Recipe, load_recipe
from hecompile.runtime.training.metrics import METRICS_FILE, read_metrics
from hecompile.runtime.training.train import run_training


@dataclass(frozen=True)
class Spec:
    """What to train. `recipe` is a file; `worker` an address, or None for plaintext PEFT on `checkpoint`.

    lora, sequence_buckets, batch_size: of the plan, for the plaintext model, which has no bundle to read them from.
    """

    recipe: str
    checkpoint: str
    worker: str | None
    lora: dict[str, Any]
    sequence_buckets: list[int]
    batch_size: int

    def save(self, path: Path) -> Path:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    spec = Spec(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    with ExitStack() as stack:
        answers = stack.enter_context(os.fdopen(os.dup(sys.stdout.fileno()), "w"))
        sys.stdout = sys.stderr  # what a library prints must not get among the answers
        model, tokenizer, recipe = _open(spec, stack)
        _answer(answers, {"ready": True})
        for _ in sys.stdin:
            cpu, wall = time.process_time(), time.perf_counter()
            run_training(model, tokenizer, recipe)
            now, peak = resident_bytes()
            _answer(
                answers,
                {
                    "steps": read_metrics(recipe.training.output_dir / METRICS_FILE),
                    "seconds": time.perf_counter() - wall,
                    "cpu_seconds": time.process_time() - cpu,
                    "resident": now,
                    "peak": peak,
                },
            )


def _open(spec: Spec, stack: ExitStack) -> tuple[AdapterModel, PreTrainedTokenizerBase, Recipe]:
    if spec.worker is not None:
        recipe = load_recipe(spec.recipe, [f"worker={spec.worker}"])
        session = stack.enter_context(open_session(recipe))
        return session.model, session.tokenizer, recipe
    from transformers import AutoTokenizer

    buckets = tuple(spec.sequence_buckets)
    config = peft.LoraConfig(**spec.lora)
    model = PlaintextPeftModel.from_pretrained(spec.checkpoint, config, buckets, spec.batch_size)
    return model, AutoTokenizer.from_pretrained(spec.checkpoint), load_recipe(spec.recipe, ["worker=tcp://unused:1"])


def _answer(stream: TextIO, message: dict[str, Any]) -> None:
    print(json.dumps(message), file=stream, flush=True)


if __name__ == "__main__":
    main()
