"""Refuse every export target but an empty one and one with nothing but an earlier build of the same kind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from hecompile.bundles.kinds import CLIENT_FORMAT, MANIFEST, PLAN, TABLE
from hecompile.compiler.ckks import export_polynomial
from hecompile.compiler.linear import compile_checkpoint
from hecompile.compiler.options import CkksOptions, CompileOptions
from hecompile.errors import InputError

Export = Callable[[Path], object]


def earlier_llama(out: Path) -> Path:
    (out / "client").mkdir(parents=True)
    (out / "client" / MANIFEST).write_text(json.dumps({"format": CLIENT_FORMAT}))
    return out / "client" / MANIFEST


def earlier_ckks(out: Path) -> Path:
    (out / "client").mkdir(parents=True)
    (out / "client" / PLAN).write_text("{}")
    (out / "client" / TABLE).write_text("the only copy")
    return out / "client" / TABLE


EXPORTS: dict[str, tuple[Export, Callable[[Path], Path], Callable[[Path], Path], str]] = {
    "llama": (
        lambda out: compile_checkpoint("unused", out, CompileOptions()), earlier_llama, earlier_ckks,
        "no earlier build of `hecompile export llama`, but one of `hecompile ckks export`",
    ),
    "ckks": (
        lambda out: export_polynomial("unused", out, CkksOptions(3)), earlier_ckks, earlier_llama,
        "no earlier build of `hecompile ckks export`, but one of `hecompile export llama`",
    ),
}  # fmt: skip
"""How to export, how to make an earlier build of that kind and one of the other, and what is said to the latter."""


@pytest.fixture(params=EXPORTS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.mark.parametrize("name", ["thesis.tex", "client/manifest.json", "client/plan.json"])
def test_a_folder_that_holds_something_else_is_refused_and_untouched(kind: str, name: str, tmp_path: Path) -> None:
    """Other programs have files of these names."""
    kept = tmp_path / name
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("the only copy")
    message = f"{re.escape(str(tmp_path))} is not empty and holds no earlier build of `hecompile [a-z ]*`; give"
    with pytest.raises(InputError, match=message):
        EXPORTS[kind][0](tmp_path)
    assert kept.read_text() == "the only copy"


def test_a_build_of_the_other_kind_is_refused_and_untouched(kind: str, tmp_path: Path) -> None:
    export, _, of_the_other, message = EXPORTS[kind]
    kept = of_the_other(tmp_path)
    before = kept.read_bytes()
    with pytest.raises(InputError, match=f"holds {message}; give another directory"):
        export(tmp_path)
    assert kept.read_bytes() == before


def test_a_build_with_something_else_beside_it_is_not_replaced(kind: str, tmp_path: Path) -> None:
    """A converted checkpoint in the folder would go with the build that is replaced."""
    export, earlier, _, _ = EXPORTS[kind]
    earlier(tmp_path)
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / "model.safetensors").write_text("the only copy")
    with pytest.raises(InputError, match=r"holds converted beside an earlier build"):
        export(tmp_path)
    assert (tmp_path / "converted" / "model.safetensors").read_text() == "the only copy"


def test_a_file_is_refused_and_untouched(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("a file")
    with pytest.raises(InputError, match="is a file; give a directory"):
        EXPORTS[kind][0](out)
    assert out.read_text() == "a file"


def test_what_cannot_be_replaced_as_a_whole_is_refused_before_anything_is_made(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^\. cannot be replaced as a whole; give the bundles a directory of their own"):
        EXPORTS[kind][0](Path())
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="link is a symbolic link; give the directory itself"):
        EXPORTS[kind][0](tmp_path / "link")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_a_folder_that_cannot_be_read_is_named(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(InputError, match=rf"cannot look into {re.escape(str(tmp_path))}: .*[Pp]ermission"):
        EXPORTS[kind][0](tmp_path)
