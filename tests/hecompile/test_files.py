"""Files written whole: whatever fails, the old content or the new one is there, and nothing beside it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from hecompile.files import file_sha256, missing_path_hint, opened_whole, reason_of, replace_directory, write_whole


def test_a_file_is_hashed(tmp_path: Path) -> None:
    content = bytes(range(256)) * 4096
    (tmp_path / "file").write_bytes(content)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    for content in (b"old", b"new"):
        write_whole(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_error_leaves_the_old_content(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", b"old")
    with pytest.raises(OSError, match="disk full"), opened_whole(tmp_path / "file") as file:
        file.write(b"half")
        raise OSError("disk full")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_private_file_is_private_from_the_start(tmp_path: Path) -> None:
    with opened_whole(tmp_path / "key", mode=0o600) as file:
        (partial,) = tmp_path.iterdir()
        assert partial.stat().st_mode & 0o777 == 0o600
        file.write(b"secret")
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("exists", [False, True])
def test_a_directory_takes_its_place(tmp_path: Path, exists: bool) -> None:
    source, target = tmp_path / "made", tmp_path / "out"
    source.mkdir()
    (source / "new").touch()
    if exists:
        target.mkdir()
        (target / "old").touch()
    replace_directory(source, target)
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_directory_that_cannot_be_replaced_comes_back(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(FileNotFoundError):
        replace_directory(tmp_path / "missing", target)
    assert [path.name for path in target.iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_reasons() -> None:
    assert reason_of(PermissionError(13, "Permission denied")) == "Permission denied"
    assert reason_of(OSError("1000 requested and 12 written")).startswith("the disk may be full")
    assert reason_of(TimeoutError("timed out")) == "timed out"
    assert reason_of(ConnectionAbortedError()) == "ConnectionAbortedError"
    assert reason_of(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")) == "not UTF-8"


def test_a_path_where_nothing_is_comes_with_the_one_that_was_meant(tmp_path: Path) -> None:
    (tmp_path / "build-mine" / "client").mkdir(parents=True)
    assert missing_path_hint(tmp_path / "build-mine") is None
    for wrong, meant in (("buidl-mine", "build-mine"), ("build-min/client", "build-mine/client"),
                         ("build-mine/clint", "build-mine/client")):  # fmt: skip
        assert missing_path_hint(tmp_path / wrong, "make one") == (
            f"{tmp_path / wrong} does not exist; did you mean {tmp_path / meant}?"
        )
    for wrong in ("other", "build-min/other", "build-mine/client/x"):
        assert missing_path_hint(tmp_path / wrong, "make one") == f"{tmp_path / wrong} does not exist; make one"
