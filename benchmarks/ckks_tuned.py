"""What the CKKS section evaluates: the reduced polynomial Llama after private LoRA training, and its interactive plan."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hecompile.compiler import CLIENT, WORKER, CompileOptions, compile_checkpoint
from hecompile.demo import worker_process
from models import REDUCED_POLYNOMIAL
from models.reduced_world import LINE_TOKENS
from runtime.client import EncryptedCausalLM
from runtime.evaluation import inference
from runtime.recipe import Recipe
from runtime.session import open_session
from runtime.train import run_training

STEPS, RATE, RANGE_LOSS = 120, 5e-3, 10.0
BATCH = 16
TRAINING_TEXT = REDUCED_POLYNOMIAL.parent / "reduced-text" / "private-train.jsonl"


@dataclass(frozen=True)
class Interactive:
    """A forward pass of the interactive plan over lines of LINE_TOKENS tokens: seconds and bytes per line."""

    seconds: float
    client_seconds: float
    bytes: float


@dataclass(frozen=True)
class Tuned:
    """A PEFT adapter, and what the lines that it is tried on cost with the interactive plan."""

    adapter: Path
    interactive: Interactive


def fine_tune(directory: Path, rows: NDArray[np.int64], steps: int = STEPS) -> Tuned:
    """Train through the encrypted worker, a process of its own; then run `rows` int64 [N, S] once through the same plan."""
    build = directory / "interactive"
    compile_checkpoint(
        str(REDUCED_POLYNOMIAL), build, CompileOptions(batch_size=BATCH, sequence_buckets=(LINE_TOKENS,))
    )
    with worker_process(build / WORKER) as address:
        recipe = Recipe.model_validate(
            {
                "model": build / CLIENT, "worker": address, "data": {"train_file": TRAINING_TEXT},
                "training": {
                    "output_dir": directory / "run", "max_steps": steps, "per_device_train_batch_size": BATCH,
                    "learning_rate": RATE, "disable_tqdm": True, "seed": 3,
                },
                "range_loss": {"alpha": RANGE_LOSS, "beta": RANGE_LOSS},
            }
        )  # fmt: skip
        with open_session(recipe) as session:
            adapter = run_training(session.model, session.tokenizer, recipe).adapter_dir
            return Tuned(adapter, _forward(session.model, torch.from_numpy(rows)))


def _forward(model: EncryptedCausalLM, rows: torch.Tensor) -> Interactive:
    before, start = model.stats(), time.perf_counter()
    with inference(model):
        for batch in rows.split(BATCH):
            model(batch, torch.ones_like(batch))
    seconds = time.perf_counter() - start
    spent = {name: value - before[name] for name, value in model.stats().items()}
    elsewhere, count = spent["worker_seconds"] + spent["wire_seconds"], len(rows)
    return Interactive(seconds / count, (seconds - elsewhere) / count, (spent["bytes_up"] + spent["bytes_down"]) / count)
