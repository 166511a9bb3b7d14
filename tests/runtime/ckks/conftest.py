"""Make the small Llama of these tests, and its bundle, once per file."""

from __future__ import annotations

from pathlib import Path

import pytest

from hecompile.compiler.ckks import export_polynomial
from tests.runtime.ckks.support import OPTIONS, small_llama


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_llama(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def build(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ckks") / "build"
    export_polynomial(str(checkpoint), out, OPTIONS)
    return out
