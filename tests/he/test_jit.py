"""A kernel is compiled again when a file that it inlines code from has changed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

INNER = """
import numba

@numba.njit(forceinline=True)
def inner(x):
    return x + {}
"""
OUTER = """
import sys
from hecompile.jit import compiled
from pieces.inner import inner

@compiled
def outer(x):
    return inner(x)

print(outer(int(sys.argv[1])), sum(outer.stats.cache_hits.values()))
"""


def test_a_change_of_what_is_inlined_is_seen_and_nothing_else_compiles_again(tmp_path: Path) -> None:
    package = tmp_path / "pieces"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "outer.py").write_text(OUTER)

    def run() -> str:
        environment = {key: value for key, value in os.environ.items() if key != "NUMBA_CACHE_DIR"}
        environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *sys.path])
        command = [sys.executable, "-c", "import sys; sys.argv[1:] = ['40']; import pieces.outer"]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()

    (package / "inner.py").write_text(INNER.format(1))
    assert run() == "41 0"
    assert run() == "41 1"  # from the disk
    (package / "inner.py").write_text(INNER.format(22))
    assert run() == "62 0"
