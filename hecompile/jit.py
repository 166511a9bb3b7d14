"""How kernels are compiled, and when what numba keeps of them on disk is out of date."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numba

_jit: Any = numba.njit(nogil=True, cache=True, boundscheck=False, error_model="numpy")


def compiled(function: Any) -> Any:
    """Compiles `function` at its first call and keeps the result on disk until a file of its package changes.

    numba by itself compiles again when the file of the function changes, and not when what it inlines from others does: an
    update of those would never have run.
    """
    kernel = _jit(function)
    source = Path(function.__code__.co_filename)
    discard_older_than(_newest(source.parent), Path(kernel.stats.cache_path), f"{source.stem}.{function.__qualname__}")
    return kernel


def discard_older_than(seconds: float, directory: Path, name: str) -> None:
    """Deletes what numba lists in `directory` for the kernel `name`, where it is older than that time of the epoch."""
    for index in directory.glob(f"{name}-*.nbi"):
        try:
            if index.stat().st_mtime < seconds:
                index.unlink()
        except FileNotFoundError:  # another process was faster
            continue


@cache
def _newest(package: Path) -> float:
    """When the file of it that changed last did so: seconds since the epoch; 0 where there are no sources to look at."""
    return max((path.stat().st_mtime for path in package.glob("*.py")), default=0.0)
