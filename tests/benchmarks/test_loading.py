"""The section on loading: every format that it saves is the same model, and what it prints of a measurement."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.training.loading import Loading, markdown, measure, save_formats
from hecompile.checkpoint.loading import load_model
from hecompile.models import TINY_LLAMA


def test_every_format_is_the_same_model(tmp_path: Path) -> None:
    formats = save_formats(Path(TINY_LLAMA), tmp_path)
    wanted = load_model(Path(TINY_LLAMA))[0].state_dict()
    assert len(formats) == 4
    for checkpoint in formats.values():
        found = load_model(checkpoint)[0].state_dict()
        assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_a_real_load() -> None:
    measured = measure(Path(TINY_LLAMA))
    assert measured.peak >= measured.before > 1 << 27 and measured.model > 1 << 20 and measured.seconds > 0


def test_what_is_printed() -> None:
    text = markdown({"safetensors": Loading(2_000_000_000, 400_000_000, 2_430_000_000, 1.5)})
    assert "| safetensors | 2.00 GB | 2.03 GB | +0.03 GB | 1.5 |" in text
