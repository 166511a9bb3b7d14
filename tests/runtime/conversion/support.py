"""Make a recipe that converts the reduced Llama, short enough for a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hecompile.models import REDUCED_LLAMA
from hecompile.runtime.conversion.recipe import ConversionRecipe

TEXT = REDUCED_LLAMA.parent / "reduced-text"


def recipe(out: Path, **changes: Any) -> ConversionRecipe:
    """Gaussian attention, polynomial norm and activation; `changes` replace whole sections."""
    document: dict[str, Any] = {
        "model": str(REDUCED_LLAMA),
        "out": out,
        "attention": {"variant": "gaussian_kernel", "bound": 6.0, "error": 1e-2},
        "norm": {"form": "polynomial", "lower": 0.3, "upper": 3.0, "error": 1e-2},
        "activation": {"form": "polynomial", "bound": 3.0, "error": 5e-2},
        "data": {
            "train_file": TEXT / "private-train.jsonl", "validation_file": TEXT / "private-heldout.jsonl", "length": 14
        },
        "training": {
            "steps": 6, "polynomial_steps": 4, "batch_size": 32, "learning_rate": 1e-3, "warmup_steps": 2,
            "save_steps": 1, "disable_tqdm": True,
        },
    }  # fmt: skip
    return ConversionRecipe.model_validate(document | changes)
