"""Locate the small Llamas that hecompile ships and tests itself on, and their texts."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent
RECIPES: Path = _HERE / "recipes"
"""Recipes for the shipped models and data."""
TINY_LLAMA: Path = _HERE / "tiny-llama"
"""Directory of the pretrained checkpoint and its tokenizer (Hugging Face layout)."""
PRIVATE_TRAIN: Path = _HERE / "private" / "train.jsonl"
"""Private questions to fine-tune on, one JSON object with `prompt` and `completion` per line."""
PRIVATE_HELDOUT: Path = _HERE / "private" / "heldout.jsonl"
"""Facts of `PRIVATE_TRAIN`, asked in phrasings that it does not use for them."""
ADMISSIONS_TRAIN: Path = _HERE / "private" / "admissions.jsonl"
"""A larger private file, one line per patient, for training with differential privacy
(`hecompile.models.worlds.admissions`)."""
ADMISSIONS_HELDOUT: Path = _HERE / "private" / "admissions_heldout.jsonl"
"""Other patients, asked for what the clinic's rule determines."""
REDUCED_LLAMA: Path = _HERE / "reduced-llama"
"""A checkpoint of two layers that can be evaluated wholly under encryption once it is converted."""
REDUCED_POLYNOMIAL: Path = _HERE / "reduced-llama-polynomial"
"""`REDUCED_LLAMA`, converted by `models/recipes/convert-reduced.yaml`."""
