from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.tiny import save_checkpoint


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with its tokenizer, not to be changed."""
    return save_checkpoint(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def damaged(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "model"))
