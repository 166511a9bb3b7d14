"""The examples of docs/api.md and the scripts beside it run as they are written."""

from __future__ import annotations

import ast
import doctest
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hecompile

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "api.md"
EXAMPLES = ROOT / "docs" / "examples"


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the page's examples, in which a build is made, and return that."""
    build = tmp_path_factory.mktemp("api") / "build"
    text = PAGE.read_text(encoding="utf-8").replace("build-api", str(build))
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        page = doctest.DocTestParser().get_doctest(text, {}, "api.md", str(PAGE), 0)
        results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(page)
    finally:
        os.chdir(before)
    assert results.failed == 0 and results.attempted > 10
    return build


def run(script: str, *arguments: object) -> str:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, EXAMPLES / script, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_answer(build: Path) -> None:
    assert "bytes, " in run("answer.py", "models/tiny-llama", build)


def test_chat(build: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="needs the extra trl")
    assert "MB up" in run("chat.py", "models/tiny-llama", build, tmp_path)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_owners(tmp_path: Path) -> None:
    shorter = ("federation.rounds=1", "training.max_steps=1", "federation.pruning=null")
    printed = run("owners.py", "models/recipes/federation.yaml", tmp_path / "out", *shorter)
    assert "round 1: 3 owners" in printed and (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()


def test_every_name_can_be_imported_and_is_known_to_type_checkers() -> None:
    assert all(getattr(hecompile, name) is not None for name in hecompile.__all__)
    stub = ast.parse((ROOT / "hecompile" / "__init__.pyi").read_text(encoding="utf-8"))
    imports = (node for node in stub.body if isinstance(node, ast.ImportFrom))
    assert sorted(alias.asname or "" for node in imports for alias in node.names) == hecompile.__all__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hecompile.nothing


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, hecompile; print('torch' in sys.modules, 'transformers' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
