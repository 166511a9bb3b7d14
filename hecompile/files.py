"""Write, replace and hash files so that a crash leaves the old content or the new one, and one process writes at a time."""

from __future__ import annotations

import contextlib
import difflib
import errno
import fcntl
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

from hecompile.errors import InputError

WHO = "{who}"
"""Stands in a message of `locked` for the process that has the lock."""
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")
_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)
_MOST_REASON = 300


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


def found_anywhere(name: str | Path) -> str:
    """Return the absolute path of a directory, which is found from everywhere; another name, such as a hub id, as it is."""
    return str(Path(name).absolute()) if str(name) and Path(name).is_dir() else str(name)


@contextmanager
def only_writer(target: Path, name: str | None = None, *, folder: bool = False) -> Iterator[None]:
    """Stay the only process that writes `target` until the block ends; enter it before looking at what is there.

    The lock is `.NAME.lock` beside the target. A folder that is written into bit by bit has `.lock` inside as well, which
    everybody sees to whom it is mounted; it is made if there is none, and removed if it is empty at the end. The system
    gives locks up when their process ends, however it ends, and the files go with them.

    Args:
        target: the folder or file.
        name: of the target in messages, by default its path.
        folder: whether it is written into bit by bit, and not replaced as a whole.

    Raises:
        InputError: another process has it, or it cannot be written to. Nothing was changed.
    """
    given, name = name, name or str(target)
    if folder and target.exists() and not target.is_dir():
        raise InputError(f"{name} is a file; name a directory")
    held = f"{name} is being written by {WHO}; wait for it to end, or name another"
    with contextlib.ExitStack() as stack:
        try:
            place = target.resolve()
            beside = place.with_name(f".{place.name}.lock")
            if not (folder and place.is_dir() and not os.access(place.parent, os.W_OK)):  # such as a mounted volume
                stack.enter_context(_folder_made(place.parent))
                stack.enter_context(locked(beside, held))
            if folder:
                stack.enter_context(_folder_made(place))
                stack.enter_context(locked(place / ".lock", held))
        except (OSError, RuntimeError, ValueError) as error:  # the last two: symbolic links in a circle, no name
            reason = reason_of(error) if isinstance(error, OSError) else str(error)
            what = f"cannot write {target}" if given is None else f"{given} cannot be used"
            raise InputError(f"{what}: {reason}; name another") from None
        yield


@contextmanager
def _folder_made(folder: Path) -> Iterator[None]:
    """Make a folder with its parents; at the end remove those of them that are empty."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:  # a file is in the way
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None
        yield
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextmanager
def locked(lock: Path, message: str) -> Iterator[None]:
    """Hold the lock file `lock`, which is made and removed.

    Raises InputError with `message` where another process has it. WHO in it stands for that one, whose number the file has.
    """
    while True:
        file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(file, lock):
                break
        except BlockingIOError:
            holder = os.pread(file, 20, 0).decode(errors="replace").strip()
            who = f"another process ({holder})" if holder.isdigit() else "another process"
            os.close(file)
            raise InputError(message.replace(WHO, who)) from None
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # its last holder removed it in between
    try:
        if WHO in message:
            os.ftruncate(file, 0)
            os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(file)


def _is_still(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def reason_of(error: OSError | UnicodeDecodeError) -> str:
    """Return in a few words why a file could not be read or written.

    Where a write ends early, numpy raises an OSError without errno that says only how many numbers it wrote of how many:
    then the disk has no space left, or a quota is used up.
    """
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    if error.errno in _NO_DESCRIPTOR:
        return "this process has too many files open; raise the limit (`ulimit -n 4096`) and run the command again"
    if error.strerror is None and _SHORT_WRITE.search(str(error)):
        return f"the disk may be full ({error}); make room and run the command again"
    return error.strerror or str(error) or type(error).__name__


def unreadable(what: str | Path, error: Exception, remedy: str) -> InputError:
    """Make the error for a file that cannot be read.

    `remedy` is left out where the file may be in order, because the system refused to open it.
    """
    if isinstance(error, OSError) and error.errno in (*_NO_DESCRIPTOR, errno.EACCES, errno.EPERM, errno.ENOMEM):
        return InputError(f"{what} cannot be read: {reason_of(error)}")
    reason = reason_of(error) if isinstance(error, (OSError, UnicodeDecodeError)) else error
    return InputError(f"{what} cannot be read ({str(reason)[:_MOST_REASON] or type(error).__name__}); {remedy}")


def read_whole(path: Path, most: int) -> bytes:
    """Read a file of at most `most` bytes. Raises ValueError for a larger one, OSError as files do."""
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most} bytes")
    return content


def missing_path_hint(path: str | Path, remedy: str = "") -> str | None:
    """Return that nothing is at `path`, with the path that was probably meant, else the remedy; None where something is."""
    path = Path(path)
    if os.path.lexists(path):
        return None
    if (near := near_neighbour(path)) is not None:
        return f"{path} does not exist; did you mean {near}?"
    return f"{path} does not exist" + (f"; {remedy}" if remedy else "")


def _created(path: Path, mode: int) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb")


def near_neighbour(path: Path) -> Path | None:
    """Return the path that was probably meant by one that does not exist; None where nothing has nearly that name.

    It has the nearest name in place of the first part that is missing.
    """
    missing = next((part for part in [*reversed(path.parents), path] if not os.path.lexists(part)), path)
    try:
        beside = sorted(entry.name for entry in missing.parent.iterdir())
    except OSError:
        return None
    rest = path.relative_to(missing)
    for near in difflib.get_close_matches(missing.name, beside, n=3, cutoff=0.6):
        if (meant := missing.with_name(near) / rest).exists():
            return meant
    return None


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
