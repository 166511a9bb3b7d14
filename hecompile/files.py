"""Write, replace and hash files so that a crash leaves the old content or the new one."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write `content` to `path`; see `opened_whole`."""
    with opened_whole(path, mode) as file:
        file.write(content)


@contextmanager
def opened_whole(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` when the block ends, and is removed where the block raises.

    The new content is on disk before the old one goes, so that a crash at any moment leaves one of them whole. A kill can
    also leave `.NAME.*.partial` beside it.

    Args:
        path: the file; its folder must exist.
        mode: permissions of the new file, less the umask.

    Raises:
        OSError: the file cannot be written; the old content stays.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with _created(partial, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def create_private(path: Path, content: bytes) -> None:
    """Create `path`, which must not exist, readable by its owner alone. Raises FileExistsError, or OSError as files do."""
    with _created(path, 0o600) as file:
        file.write(content)


def replace_directory(source: Path, target: Path) -> None:
    """Rename the directory `source` to `target`, in place of a directory that is there already.

    The old directory is put aside first, comes back where the rename fails, and is deleted last. A kill between the two
    renames leaves it whole in `.NAME.old.*` beside `target`.
    """
    if not target.exists():
        source.rename(target)
        return
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
    old = aside / target.name
    try:
        target.rename(old)
        source.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(aside, ignore_errors=True)


def reason_of(error: OSError | UnicodeDecodeError) -> str:
    """Return in a few words why a file could not be read or written.

    Where a write ends early, numpy raises an OSError without errno that says only how many numbers it wrote of how many:
    then the disk has no space left, or a quota is used up.
    """
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    if error.strerror is None and _SHORT_WRITE.search(str(error)):
        return f"the disk may be full ({error}); make room and run the command again"
    return error.strerror or str(error) or type(error).__name__


def _created(path: Path, mode: int) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb")


def near_neighbour(path: Path) -> Path | None:
    """Return what lies beside a path that does not exist and has nearly its name; None where nothing does."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return None
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.75)
    return path.with_name(near[0]) if near else None


def did_you_mean(path: Path) -> str:
    """Return a question with what has nearly the name of a path that does not exist, to end a message; else nothing."""
    near = near_neighbour(path)
    return "" if near is None else f"; did you mean {near}?"


def explain_missing(path: Path) -> str:
    """Say that nothing is at a path: what has nearly its name, or how far it exists."""
    if question := did_you_mean(path):
        return f"{path}: it does not exist{question}"
    existing = next((folder for folder in path.parents if folder.is_dir()), None)
    within = "" if existing in (None, path.parent) else f", {existing} being the last folder that does"
    return f"{path}: it does not exist{within}"
