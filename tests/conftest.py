"""Fixtures that every test may use: golden files. A peer that goes away ends no test process."""

from __future__ import annotations

import difflib
import os
import signal
from pathlib import Path

# Read by the OpenMP runtime when torch is imported: test processes share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest

ROOT = Path(__file__).parents[1]
"""The top of the repository."""
GOLDEN_DIR = Path(__file__).parent / "golden" / "expected"


@pytest.fixture(autouse=True)
def _no_broken_pipe_ends_the_process() -> None:
    """Ignore SIGPIPE, as Python does from its start: LLVM, inside concrete-python, undoes that where a test loads it."""
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files instead of comparing")


class Golden:
    """Compares a text with the committed file of that name; a difference fails with a unified diff."""

    def __init__(self, update: bool) -> None:
        self.update = update

    def check(self, name: str, text: str) -> None:
        path = GOLDEN_DIR / f"{name}.txt"
        if self.update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        assert path.exists(), f"no golden file {path.name}; run pytest --update-golden, read the file, commit it"
        expected = path.read_text(encoding="utf-8")
        diff = "".join(
            difflib.unified_diff(
                expected.splitlines(keepends=True), text.splitlines(keepends=True), f"expected {path.name}", "actual"
            )
        )
        assert not diff, f"the text of {name} changed:\n{diff}"


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(bool(request.config.getoption("--update-golden")))
