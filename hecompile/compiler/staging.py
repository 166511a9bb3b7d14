"""Make a build in a folder beside its target, which outlives an interruption.

    .NAME.partial/export.json       the request, and the public seed that was drawn for it
    .NAME.partial/lock              held while an export is writing
    .NAME.partial/circuits.jsonl    the plan id, then one line per circuit whose files are complete, with their hashes
    .NAME.partial/build/            will become NAME
    .NAME.partial/scratch/          integer weights that are not written yet

An export that is killed leaves the folder. The next export into that target with the same request takes its seed and every
circuit whose files still hash to their line, and makes the rest. A line is written after its files are on the disk, so an
unfinished file is never listed; files that are not listed are deleted. An export with another request, or whose plan turns
out to be another (another checkpoint), starts afresh. A folder that no export has made is refused and not touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from hecompile.errors import InputError
from hecompile.files import locked, reason_of, replace_directory, write_whole
from hecompile.he.random.sampling import PublicSeed

FORMAT, VERSION = "hecompile-export", 1
RECORD, LOCK, JOURNAL, BUILD, SCRATCH = "export.json", "lock", "circuits.jsonl", "build", "scratch"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    format: str
    version: int
    request: str
    public_seed: str


def staging_path(out: Path) -> Path:
    """Return the folder in which a build of `out` is made."""
    return out.parent / f".{out.name}.partial"


class Staging:
    """Keep a build under way, with a journal of its complete circuits. Open it with `staging`.

    Attributes:
        build: the folder that will become the target.
        scratch: a folder for what the build is made of.
        public_seed: of this build; that of the interrupted one where it goes on.
        resumed: whether it goes on from an interrupted export with the same request.
    """

    def __init__(self, folder: Path, request: str, drawn: PublicSeed) -> None:
        self._folder = folder
        self._journal = folder / JOURNAL
        self.build, self.scratch = folder / BUILD, folder / SCRATCH
        record = _read_record(folder)
        self.resumed = record is not None and record.request == request
        if self.resumed and record is not None:
            self.public_seed = PublicSeed.from_hex(record.public_seed)
            return
        self.public_seed = drawn
        self._clear()
        fresh = _Record(format=FORMAT, version=VERSION, request=request, public_seed=drawn.hex())
        write_whole(folder / RECORD, json.dumps(fresh.model_dump()).encode() + b"\n")

    def begin(self, plan_id: str) -> list[dict[str, Any]]:
        """Return the journal's lines for circuits of this plan, oldest first; another plan's are dropped with its files."""
        lines = self._lines()
        if lines[:1] != [{"plan_id": plan_id}]:
            self._clear()
            lines = []
            self.note({"plan_id": plan_id})
        self.build.mkdir(exist_ok=True)
        return lines[1:]

    def note(self, line: dict[str, Any]) -> None:
        """Append a line to the journal; it is on the disk when this returns."""
        with self._journal.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def drop_unlisted(self, listed: Iterable[Path]) -> None:
        """Delete every file of the build that is not `listed`."""
        kept = set(listed)
        for path in self.build.rglob("*"):
            if path.is_file() and path not in kept:
                path.unlink()

    @property
    def worth_keeping(self) -> bool:
        """Tell whether a circuit is complete."""
        return len(self._lines()) > 1

    def _lines(self) -> list[dict[str, Any]]:
        """Read the journal up to the first line that an interruption cut off."""
        lines = []
        with contextlib.suppress(FileNotFoundError, ValueError, RecursionError):
            for text in self._journal.read_text(encoding="utf-8").splitlines(keepends=True):
                if not text.endswith("\n"):
                    break
                lines.append(json.loads(text))
        return lines

    def _clear(self) -> None:
        self._journal.unlink(missing_ok=True)
        if self.build.exists():
            shutil.rmtree(self.build)


@contextlib.contextmanager
def staging(out: Path, request: str, drawn: PublicSeed) -> Iterator[Staging]:
    """Make a build of `out`: on a clean end it replaces `out`; an error removes the build, an interruption keeps it.

    Args:
        out: the target.
        request: identifies the export; an interrupted one with the same request goes on.
        drawn: the public seed of a fresh start.

    Raises:
        InputError: another export is writing there, the folder is none of an export, or the disk cannot be written.
    """
    folder = staging_path(out)
    made = _missing_parents(folder)
    keep = False
    try:
        _refuse_foreign(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / LOCK, f"another export is writing {out} at this moment; wait for it or choose another"):
            try:
                stage = Staging(folder, request, drawn)
                try:
                    yield stage
                except (KeyboardInterrupt, SystemExit):
                    keep = stage.worth_keeping
                    raise
                replace_directory(stage.build, out)
            finally:
                if not keep:
                    shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise InputError(f"cannot write {out}: {reason_of(error)}") from error
    finally:
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()  # only where it is empty


def _missing_parents(folder: Path) -> list[Path]:
    """Return the parents that a build has to make, deepest first."""
    return [parent for parent in folder.parents if not parent.exists()]


def _refuse_foreign(folder: Path) -> None:
    """Raise InputError for a folder that no export has made: it has neither a valid record nor a lock alone."""
    if not folder.exists() and not folder.is_symlink():
        return
    ours = folder.is_dir() and not folder.is_symlink()
    if ours and _read_record(folder) is None:
        ours = all(path.name == LOCK or path.name.startswith(f".{RECORD}.") for path in folder.iterdir())
    if not ours:
        raise InputError(f"{folder} is in the way and is not an interrupted export of this program; move or remove it")


def _read_record(folder: Path) -> _Record | None:
    try:
        record = _Record.model_validate_json((folder / RECORD).read_text(encoding="utf-8"))
        PublicSeed.from_hex(record.public_seed)
    except (FileNotFoundError, UnicodeDecodeError, ValidationError, InputError):
        return None
    return record if (record.format, record.version) == (FORMAT, VERSION) else None
