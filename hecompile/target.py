"""The folder that an export writes to: a build takes the place of the whole of it."""

from __future__ import annotations

from pathlib import Path

from hecompile.circuit_writer import CLIENT, WORKER
from hecompile.errors import InputError


def check_target(out: Path, marker: str) -> None:
    """Refuses a target that a build must not replace: InputError, with nothing touched.

    Args:
        out: may be missing, an empty folder, or a folder of nothing but an earlier build of the same kind.
        marker: the file that the client's half of such a build has.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out} is a file; give a directory for the bundles")
    if any(out.iterdir()) and not (out / CLIENT / marker).is_file():
        raise InputError(f"{out} is not empty and holds no earlier build of this kind; give another directory")
    if others := sorted(path.name for path in out.iterdir() if path.name not in (CLIENT, WORKER)):
        raise InputError(
            f"{out} holds {others[0]} beside an earlier build and would lose it with that; move it or give another directory"
        )
