"""Make recipes with a privacy section over the ten examples of the training tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hecompile.runtime.privacy.ledger import PrivacyLedger, Subject
from hecompile.runtime.recipes.privacy import PrivacySection
from hecompile.runtime.recipes.training import Recipe
from tests.support.training import RECORDS, make_recipe, make_tokenizer

TOKENIZER = make_tokenizer()
N = len(RECORDS)
DELTA = 1e-3


def private_recipe(directory: Path, privacy: dict[str, Any], **training: Any) -> Recipe:
    directory.mkdir(exist_ok=True)
    recipe = make_recipe(directory, **{"per_device_train_batch_size": 2, "save_strategy": "no"} | training)
    return recipe.model_copy(update={"privacy": PrivacySection(**{"delta": DELTA} | privacy)})


def everyone(**more: Any) -> dict[str, Any]:
    """Make settings in which each step takes all examples."""
    return {"per_device_train_batch_size": 2, "gradient_accumulation_steps": N // 2, "warmup_steps": 0} | more


def ledger_of(recipe: Recipe) -> PrivacyLedger:
    return PrivacyLedger(
        recipe.data.train_file.with_name("train.jsonl.ledger"), Subject.of_file(recipe.data.train_file, N, DELTA)
    )
