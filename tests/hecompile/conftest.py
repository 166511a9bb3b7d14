"""Builds that the tests of this folder share and do not change."""

from __future__ import annotations

from pathlib import Path

import pytest

from hecompile.compiler import linear as compiler
from hecompile.compiler.linear import compile_checkpoint
from tests.support.tiny import OPTIONS, exported, save_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved checkpoint of the random Llama."""
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def build(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It compiled with OPTIONS. Copy it before changing it."""
    out = tmp_path_factory.mktemp("build") / "out"
    compile_checkpoint(str(checkpoint), out, OPTIONS)
    return out


@pytest.fixture
def quick_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile from the session's one export instead of running the exporter again."""
    monkeypatch.setattr(compiler, "export_onnx", lambda model: exported())
