"""Prepare what the CKKS section evaluates: the reduced polynomial Llama after private LoRA training, and its plan."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from hecompile.bundles.kinds import CLIENT, WORKER
from hecompile.compiler.linear import CompileOptions, compile_checkpoint
from hecompile.models import REDUCED_POLYNOMIAL
from hecompile.models.worlds.reduced_world import ANSWERS, LINE_TOKENS
from hecompile.runtime.client.session import open_session
from hecompile.runtime.model.backend import ForwardPass, RemoteModel
from hecompile.runtime.recipes.training import Recipe
from hecompile.runtime.training.train import run_training
from hecompile.runtime.worker.process import worker_process

STEPS, RATE, RANGE_LOSS = 120, 5e-3, 10.0
BATCH = 16
TRAINING_TEXT = REDUCED_POLYNOMIAL.parent / "reduced-text" / "private-train.jsonl"


@dataclass(frozen=True)
class Quality:
    """Hold how good predictions are.

    Attributes:
        loss: nats per token.
        right: the share of next tokens that are the likeliest.
        answers: that share among the tokens that the words before them determine
            (`hecompile.models.worlds.reduced_world.ANSWERS`); NaN where rows end before them.
    """

    loss: float
    right: float
    answers: float


def quality(logits: NDArray[np.float32], rows: NDArray[np.int64]) -> Quality:
    """Return the quality of logits [B, S, V] on rows [B, S]."""
    targets = torch.from_numpy(rows[:, 1:]).flatten()
    loss = cross_entropy(torch.from_numpy(logits[:, :-1]).flatten(0, 1), targets)
    right = logits[:, :-1].argmax(-1) == rows[:, 1:]  # [B, S - 1], of the tokens at 1 to S - 1
    at = [position - 1 for position in ANSWERS if position < rows.shape[1]]
    return Quality(float(loss), float(right.mean()), float(right[:, at].mean()) if at else math.nan)


@dataclass(frozen=True)
class Trial:
    """Hold a forward pass over held-out rows, what it cost and how good it is."""

    passed: ForwardPass
    quality: Quality


def tried(model: RemoteModel, rows: NDArray[np.int64]) -> Trial:
    """Pass rows int64 [B, S] through the model once."""
    passed = model.forward(rows)
    return Trial(passed, quality(passed.logits, rows))


@dataclass(frozen=True)
class Tuned:
    """Hold a PEFT adapter, and the trial of the interactive plan that trained it on held-out lines."""

    adapter: Path
    interactive: Trial


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
            return Tuned(adapter, tried(session, rows))
