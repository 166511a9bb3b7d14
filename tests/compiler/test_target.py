"""What an export finds in its target: only an earlier build of its own kind, by itself, is replaced."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from hecompile.bundle_kinds import MANIFEST, PLAN
from hecompile.ckks.bundle import CkksOptions, export_polynomial
from hecompile.compiler import CompileOptions, compile_checkpoint
from hecompile.errors import InputError

EXPORTS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "llama": (lambda out: compile_checkpoint("unused", out, CompileOptions()), MANIFEST, PLAN),
    "ckks": (lambda out: export_polynomial("unused", out, CkksOptions(3)), PLAN, MANIFEST),
}
"""How to export, what an earlier build has in its client's half, and what one of the other kind has there."""


@pytest.fixture(params=EXPORTS)
def kind(request: pytest.FixtureRequest) -> tuple[Callable[[Path], object], str, str]:
    return EXPORTS[request.param]


def earlier_build(out: Path, marker: str) -> Path:
    (out / "client").mkdir(parents=True)
    (out / "client" / marker).write_text("the only copy")
    return out / "client" / marker


def test_a_folder_that_holds_something_else_is_refused_and_untouched(
    kind: tuple[Callable[[Path], object], str, str], tmp_path: Path
) -> None:
    export, _, _ = kind
    (tmp_path / "thesis.tex").write_text("the only copy")
    with pytest.raises(InputError, match=f"{re.escape(str(tmp_path))} is not empty and holds no earlier build"):
        export(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert (tmp_path / "thesis.tex").read_text() == "the only copy"


def test_a_build_of_the_other_kind_is_refused_and_untouched(
    kind: tuple[Callable[[Path], object], str, str], tmp_path: Path
) -> None:
    export, _, of_the_other = kind
    kept = earlier_build(tmp_path, of_the_other)
    with pytest.raises(InputError, match="holds no earlier build of this kind"):
        export(tmp_path)
    assert kept.read_text() == "the only copy"


def test_a_build_with_something_else_beside_it_is_not_replaced(
    kind: tuple[Callable[[Path], object], str, str], tmp_path: Path
) -> None:
    """A converted checkpoint in the folder would go with the build that is replaced."""
    export, marker, _ = kind
    earlier_build(tmp_path, marker)
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / "model.safetensors").write_text("the only copy")
    with pytest.raises(InputError, match=r"holds converted beside an earlier build"):
        export(tmp_path)
    assert (tmp_path / "converted" / "model.safetensors").read_text() == "the only copy"


def test_a_file_is_refused_and_untouched(kind: tuple[Callable[[Path], object], str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("a file")
    with pytest.raises(InputError, match="is a file; give a directory"):
        kind[0](out)
    assert out.read_text() == "a file"
