"""A build is written whole or not at all, is the same for the same seed, and replaces only an earlier build."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from hecompile.bundles.client import ClientBundle
from hecompile.bundles.worker import WorkerBundle
from hecompile.compiler import circuit_writer
from hecompile.compiler import linear as compiler
from hecompile.compiler.linear import compile_checkpoint
from hecompile.errors import InputError
from hecompile.he.random.sampling import PublicSeed
from tests.support.tiny import OPTIONS

ROWS = 2 * (64 + 32 + 96 + 32 + 32 + 32 + 32 + 48) - 32
"""Rows of hints: the outputs of the linears of both layers, forward and backward; the embedding needs no gradient."""


def hashes(directory: Path) -> dict[str, str]:
    """Relative path → SHA-256, of every file but the check vectors, which are drawn afresh."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.parent.name not in ("checks", "wraps"):
            content = path.read_bytes()
            if path == directory / "client" / "manifest.json":
                manifest = json.loads(content)
                secret = ("checks/", "wraps/")
                manifest["files"] = [file for file in manifest["files"] if not file["path"].startswith(secret)]
                content = json.dumps(manifest).encode()
            found[path.relative_to(directory).as_posix()] = hashlib.sha256(content).hexdigest()
    return found


def test_the_same_seed_gives_the_same_bytes(build: Path, checkpoint: Path, tmp_path: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    plan_id = compile_checkpoint(str(checkpoint), tmp_path / "out", OPTIONS, lambda *event: heard.append(event))
    before, after = hashes(build), hashes(tmp_path / "out")
    assert len(before) > 35  # 15 circuits and as many hints, plan, manifests, tokenizer
    assert [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)] == []
    assert heard[0] == ("load", 0, 1) and heard[-3:] == [("hints (rows)", ROWS, ROWS), ("checks", 0, 1), ("write", 0, 1)]
    assert ClientBundle.open(build / "client").plan_id == WorkerBundle.open(build / "worker").plan_id == plan_id


@pytest.mark.usefixtures("quick_export")
def test_a_rebuild_replaces_the_old_build_and_a_fresh_seed_makes_another_plan(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = compile_checkpoint(str(checkpoint), out, OPTIONS)
    (out / "client" / "left-over").write_text("of the old build")
    fresh = dataclasses.replace(OPTIONS, public_seed=None)
    second = compile_checkpoint(str(checkpoint), out, fresh)
    assert first != second
    bundle = ClientBundle.open(out / "client")
    assert bundle.plan_id == second and bundle.public_seed != OPTIONS.public_seed
    assert not (out / "client" / "left-over").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("quick_export")
def test_an_empty_directory_is_a_good_target(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    compile_checkpoint(str(checkpoint), out, OPTIONS)
    assert sorted(path.name for path in out.iterdir()) == ["client", "worker"]


@pytest.mark.usefixtures("quick_export")
@pytest.mark.parametrize("earlier", [True, False], ids=["over a build", "afresh"])
def test_a_failure_midway_leaves_everything_as_it_was(
    earlier: bool, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "new" / "folders" / "out" if not earlier else tmp_path / "out"
    if earlier:
        compile_checkpoint(str(checkpoint), out, OPTIONS)
    before = hashes(tmp_path)
    write_hint, written = circuit_writer.write_hint, []

    def failing(directory: Path, circuit: str, *hint: object) -> Path:
        if len(written) == 5:
            raise OSError(28, "No space left on device")
        written.append(circuit)
        return write_hint(directory, circuit, *hint)

    monkeypatch.setattr(circuit_writer, "write_hint", failing)
    fresh = dataclasses.replace(OPTIONS, public_seed=PublicSeed.draw())
    with pytest.raises(InputError, match=r"cannot write .*out: No space left on device"):
        compile_checkpoint(str(checkpoint), out, fresh)
    assert len(written) == 5
    assert hashes(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if earlier else [])


@pytest.mark.usefixtures("quick_export")
def test_a_disk_that_fills_while_numpy_writes_is_called_full(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ndarray.tofile` raises without errno where a write ends early."""

    def failing(*_: object) -> Path:
        raise OSError("393216 requested and 128992 written")

    monkeypatch.setattr(circuit_writer, "write_hint", failing)
    message = r"cannot write .*out: the disk may be full \(393216 requested and 128992 written\); make room"
    with pytest.raises(InputError, match=message):
        compile_checkpoint(str(checkpoint), tmp_path / "out", OPTIONS)
    assert not any(tmp_path.iterdir())


def test_bad_input_leaves_no_empty_folders(tmp_path: Path, checkpoint: Path) -> None:
    too_long = dataclasses.replace(OPTIONS, sequence_buckets=(8, 65))
    with pytest.raises(InputError, match="longer than the model's 64 positions"):
        compile_checkpoint(str(checkpoint), tmp_path / "new" / "out", too_long)
    with pytest.raises(InputError, match="nowhere"):
        compile_checkpoint(str(tmp_path / "nowhere"), tmp_path / "new" / "out", OPTIONS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick_export")
def test_a_place_that_cannot_be_written(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"cannot write .*out: Not a directory"):
        compile_checkpoint(str(checkpoint), tmp_path / "file" / "out", OPTIONS)


def test_nothing_in_a_build_tells_of_the_machine(build: Path) -> None:
    """Paths of the compiler's own source, which the exporter notes in stack traces, must not get into the bundles."""
    sources = [Path(compiler.__file__).parents[2], Path(pytest.__file__).parents[1]]
    for path in build.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert not any(str(source).encode() in data for source in sources), path.name
            assert path.suffix != ".onnx" or b".py" not in data, path.name
