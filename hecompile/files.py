"""Write, replace and hash files so that a crash leaves the old content or the new one."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path

_HASH_CHUNK = 1 << 22


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def publish(build: Path, out: Path) -> None:
    """Rename `build` into the place of `out`; an earlier build there is put aside until that has worked."""
    old = out.parent / f".{out.name}.{os.getpid()}.old"
    try:
        if out.exists():
            out.rename(old)
        build.rename(out)
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(old, ignore_errors=True)


_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")


def reason_of(error: OSError) -> str:
    """Why a file could not be written. numpy says only how many numbers it wrote of how many, without errno, where a write
    ends early: that is a disk with no space left, or a quota that is used up."""
    if error.strerror is None and _SHORT_WRITE.search(str(error)):
        return f"the disk may be full ({error}); make room and run the command again"
    return error.strerror or str(error)


def replace_directory(source: Path, target: Path) -> None:
    """Rename `source` to `target`; a directory that is there already is moved aside first and deleted last."""
    if target.exists():
        aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
        target.rename(aside / target.name)
        source.rename(target)
        shutil.rmtree(aside)
    else:
        source.rename(target)
