"""A kernel is compiled again when a file that it inlines code from has changed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hecompile.he.kernels import jit

INNER = """
import numba

@numba.njit(forceinline=True)
def inner(x):
    return x + {}
"""
OUTER = """
import sys
from hecompile.he.kernels.jit import compiled
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


def test_a_change_below_the_schemes_folder_is_one_of_every_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of CKKS and of the random generators inline code of `hecompile/he/kernels`."""
    room = tmp_path / "he" / "kernels"
    room.mkdir(parents=True)
    (room / "inlined.py").write_text("")
    os.utime(room / "inlined.py", (2e9, 2e9))
    index = tmp_path / "module.kernel-1.nbi"
    index.write_text("")
    monkeypatch.setattr(jit, "_SHARED", tmp_path / "he")
    monkeypatch.setattr(jit, "_jit", lambda function: SimpleNamespace(stats=SimpleNamespace(cache_path=str(tmp_path))))
    namespace: dict[str, Any] = {}
    exec(compile("def kernel(): ...", str(tmp_path / "module.py"), "exec"), namespace)
    jit.compiled(namespace["kernel"])
    assert not index.exists()
