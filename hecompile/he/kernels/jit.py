"""Compile kernels and decide when what numba keeps of them on disk is out of date."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numba

_jit: Any = numba.njit(nogil=True, cache=True, boundscheck=False, error_model="numpy")
inlined: Any = numba.njit(forceinline=True, nogil=True, boundscheck=False, error_model="numpy")
"""Make a function that LLVM inlines into the kernels that call it."""

_SHARED = Path(__file__).parents[1]
"""hecompile/he, whose code every kernel may inline, wherever the kernel itself stands."""


def compiled(function: Any) -> Any:
    """Compile `function` at its first call and keep the result on disk until a file that it may inline changes.

    Those files are all that stand in the kernel's own folder or in `hecompile/he`, and below them. numba by itself compiles
    again when the file of the function changes, and not when what it inlines from others does: an update of those would
    never have run.
    """
    kernel = _jit(function)
    source = Path(function.__code__.co_filename)
    newest = max(_newest(source.parent), _newest(_SHARED))
    discard_older_than(newest, Path(kernel.stats.cache_path), f"{source.stem}.{function.__qualname__}")
    return kernel


def discard_older_than(seconds: float, directory: Path, name: str) -> None:
    """Delete what numba keeps in `directory` for the kernel `name`, where it is older than that time of the epoch."""
    for index in directory.glob(f"{name}-*.nbi"):
        try:
            if index.stat().st_mtime < seconds:
                index.unlink()
        except FileNotFoundError:  # another process was faster
            continue


@cache
def _newest(folder: Path) -> float:
    """Return when a Python file in `folder` or below last changed: seconds since the epoch; 0 where there are none."""
    return max((path.stat().st_mtime for path in folder.rglob("*.py")), default=0.0)
