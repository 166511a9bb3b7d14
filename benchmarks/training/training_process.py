"""Train when told to: a round of steps for each line on standard input, an event for each answer.

    python -m benchmarks.training.training_process SPEC.json

Started by `benchmarks.training.stepping`. It runs `hecompile.runtime.training.train.run_training`, on the encrypted model
over a worker's address or on plaintext PEFT. Its events are `ready`, then `round` with the file of its metrics, its CPU
seconds, in all and by part, and its peak resident memory in bytes.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.client.client_parts import PartClock
from benchmarks.timing import resident_bytes
from hecompile.runtime.client.session import open_session
from hecompile.runtime.model.adapter import AdapterModel
from hecompile.runtime.model.plaintext import PlaintextPeftModel
from hecompile.runtime.recipes.training import Recipe, load_recipe
from hecompile.runtime.training.metrics import METRICS_FILE
from hecompile.runtime.training.train import run_training
from hecompile.runtime.wire.events import emit


@dataclass(frozen=True)
class Spec:
    """Say what to train. `recipe` is a file; `worker` an address, or None for plaintext PEFT on `checkpoint`.

    lora, sequence_buckets, batch_size: those of the plan, for the plaintext model, which has no bundle to read them from.
    parts: split the CPU seconds by part (`benchmarks.client.client_parts`).
    """

    recipe: str
    checkpoint: str
    worker: str | None
    lora: dict[str, Any]
    sequence_buckets: list[int]
    batch_size: int
    parts: bool = False

    def save(self, path: Path) -> Path:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path


def main() -> None:
    """Open the model that the command line names, and train a round for each line."""
    transformers.utils.logging.disable_progress_bar()
    spec = Spec(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    clock = PartClock()
    if spec.parts:
        clock.watch()
    with ExitStack() as stack:
        with _quiet():
            model, tokenizer, recipe = _open(spec, stack)
        emit("ready")
        for _ in sys.stdin:
            before = time.process_time()
            clock.take()
            with _quiet():
                run_training(model, tokenizer, recipe)
            seconds, (_, peak) = time.process_time() - before, resident_bytes()
            metrics = str(recipe.training.output_dir / METRICS_FILE)
            emit("round", metrics=metrics, cpu_seconds=seconds, peak=peak, parts=json.dumps(clock.take()))


def _quiet() -> contextlib.AbstractContextManager[object]:
    """Send to standard error what a library prints: it must not get among the events."""
    return contextlib.redirect_stdout(sys.stderr)


def _open(spec: Spec, stack: ExitStack) -> tuple[AdapterModel, PreTrainedTokenizerBase, Recipe]:
    if spec.worker is not None:
        recipe = load_recipe(spec.recipe, [f"worker={spec.worker}"])
        session = stack.enter_context(open_session(recipe))
        return session.model, session.tokenizer, recipe
    buckets = tuple(spec.sequence_buckets)
    config = peft.LoraConfig(**spec.lora)
    model = PlaintextPeftModel.from_pretrained(spec.checkpoint, config, buckets, spec.batch_size)
    return model, AutoTokenizer.from_pretrained(spec.checkpoint), load_recipe(spec.recipe, ["worker=tcp://unused:1"])


if __name__ == "__main__":
    main()
