"""Describe and check the files of a client bundle."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from hecompile.bundles.kinds import MANIFEST
from hecompile.errors import InputError
from hecompile.files import file_sha256

REMEDY = "make the bundle again with `hecompile export llama`"


class FileRecord(BaseModel):
    """Hold size and hash of one file; `path` is relative to the bundle."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    path: str
    bytes: int
    sha256: str


def describe_file(directory: Path, path: Path) -> FileRecord:
    """Hash a file of the bundle and return its record."""
    relative = path.relative_to(directory).as_posix()
    return FileRecord(path=relative, bytes=path.stat().st_size, sha256=file_sha256(path))


def is_intact(directory: Path, record: FileRecord) -> bool:
    """Tell whether the file of a record is there, whole and unchanged."""
    path = directory / record.path
    return path.is_file() and path.stat().st_size == record.bytes and file_sha256(path) == record.sha256


def check_file(directory: Path, record: FileRecord) -> None:
    """Raise InputError unless the file of a record lies in the client bundle `directory`, with that size and hash."""
    path = directory / record.path
    if not path.resolve().is_relative_to(directory.resolve()):
        raise InputError(f"{directory / MANIFEST} names a file outside the bundle; {REMEDY}")
    if not path.is_file():
        raise InputError(f"client bundle {directory}: {record.path} is missing; {REMEDY}")
    size = path.stat().st_size
    if size != record.bytes:
        raise InputError(f"client bundle {directory}: {record.path} has {size} bytes of {record.bytes}; {REMEDY}")
    if file_sha256(path) != record.sha256:
        raise InputError(f"client bundle {directory}: {record.path} is corrupt (its hash is wrong); {REMEDY}")
