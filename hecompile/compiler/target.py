"""Check the folder that an export writes to: a build takes the place of the whole of it."""

from __future__ import annotations

from pathlib import Path

from hecompile.bundles.kinds import CLIENT, WORKER, BundleKind, kind_of
from hecompile.errors import InputError
from hecompile.files import reason_of


def check_target(out: Path, wanted: BundleKind) -> None:
    """Raise InputError for a target that a build must not, or cannot, replace. Nothing is touched.

    Args:
        out: may be missing, an empty folder, or a folder of nothing but an earlier build of the same kind.
        wanted: kind of the client's half of the build.
    """
    if not out.name:
        raise InputError(f"{out} cannot be replaced as a whole; give the bundles a directory of their own")
    if out.is_symlink():
        raise InputError(f"{out} is a symbolic link; give the directory itself")
    try:
        _check_folder(out, wanted)
    except OSError as error:
        raise InputError(f"cannot look into {out}: {reason_of(error)}") from error


def _check_folder(out: Path, wanted: BundleKind) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out} is a file; give a directory for the bundles")
    kind = kind_of(out / CLIENT)
    inside = sorted(path.name for path in out.iterdir())
    if inside and kind is not wanted:
        other = "" if kind is None else f", but one of `hecompile {kind.command}`"
        raise InputError(
            f"{out} is not empty and holds no earlier build of `hecompile {wanted.command}`{other}; give another directory"
        )
    if others := [name for name in inside if name not in (CLIENT, WORKER)]:
        raise InputError(
            f"{out} holds {others[0]} beside an earlier build and would lose it with that; move it or give another directory"
        )
