"""Keep the tiny checkpoints of all families in one folder, each made, exported and built once."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def family_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which `tests.support.families.checkpoint` keeps what it makes."""
    return tmp_path_factory.mktemp("families")
