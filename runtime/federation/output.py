"""Guard the output directory of a federation: a finished one is not lost to the next by accident."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from hecompile.errors import InputError
from hecompile.files import only_writer
from hecompile.runtime.recipes.training import TrainingSection

ROUNDS_FILE, ROSTER_FILE, ADAPTER_DIR, KEYS_DIR = "rounds.jsonl", "roster.json", "adapter", "keys"
STATE_FILE, OWNER_STATE_FILE = "federation.state", "federation.json"


def only_server(section: TrainingSection) -> AbstractContextManager[None]:
    """Stay the only server that writes to the output directory; see `only_writer`."""
    return only_writer(section.output_dir, f"training.output_dir {section.output_dir}", folder=True)


def only_owner(section: TrainingSection, name: str) -> AbstractContextManager[None]:
    """Stay the only process that writes to an owner's folder; see `only_writer`."""
    folder = section.output_dir / name
    return only_writer(folder, f"the folder {folder} in training.output_dir", folder=True)


def require_free(
    section: TrainingSection, *, server: bool = False, owners: Sequence[str] = (), interrupted: bool = False
) -> bool:
    """Return whether the output directory holds a federation, which is then to be replaced.

    Looks for what the server wrote, and for the copies of the adapter that `owners` have. Nothing is written or removed yet:
    if the new federation cannot begin, the one before must remain. Raises InputError where the recipe does not allow to
    replace it, or the directory is a file; where it was `interrupted`, with how to go on.
    """
    out = section.output_dir
    require_directory(section)
    earlier = [*(_of_server(out) if server else ()), *(path for name in owners for path in _of_owner(out, name))]
    if earlier and not section.overwrite_output_dir:
        state = "was interrupted: go on with --resume," if interrupted else "cannot be continued;"
        raise InputError(
            f"training.output_dir {out} already holds a federation ({earlier[0].relative_to(out)}), which {state} choose "
            f"another directory, or set training.overwrite_output_dir=true to replace it"
        )
    return bool(earlier)


def require_directory(section: TrainingSection) -> None:
    """Raise InputError where the output directory is a file."""
    if section.output_dir.exists() and not section.output_dir.is_dir():
        raise InputError(f"training.output_dir {section.output_dir} is a file; name a directory")


def clear_server(out: Path) -> None:
    """Remove what the server of an earlier federation wrote."""
    _remove([*_of_server(out), *(path for path in (out / STATE_FILE,) if path.exists())])


def clear_owner(out: Path, name: str) -> None:
    """Remove what an owner of an earlier federation wrote, and nothing else that is in its folder."""
    _remove([*_of_owner(out, name), *(out / name).glob("round-*"), *(out / name).glob(OWNER_STATE_FILE)])


def _of_server(out: Path) -> list[Path]:
    rounds = out / ROUNDS_FILE
    if rounds.is_file() and not rounds.stat().st_size:
        return []  # it ended in its first round: the adapter is the untrained one
    return [path for path in (rounds, out / ADAPTER_DIR) if path.exists()]


def _of_owner(out: Path, name: str) -> list[Path]:
    adapter = out / name / ADAPTER_DIR
    return [adapter] if adapter.exists() else []


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
