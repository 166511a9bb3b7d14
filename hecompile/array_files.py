"""Read arrays from .npy files: one place for what such a file may hold, and for what reading it may raise."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy

from hecompile.mapped_files import map_array

_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_MOST_HEADER = 1 << 12


def map_npy(path: Path) -> np.ndarray:
    """Map the array of a .npy file, read-only and in C order.

    Raises:
        ValueError: the file is another, holds objects or Fortran order, or is shorter than its header says.
        OSError: as files do.
    """
    with path.open("rb") as file:
        shape, dtype = _header(file)
        start = file.tell()
    return map_array(path, dtype, shape, start)


def read_npy(path: Path) -> np.ndarray:
    """Read the array of a .npy file into memory, no more of it than there is. Raises as `map_npy` does."""
    mapped = map_npy(path)
    return np.array(mapped)


def npy_in(content: np.ndarray) -> np.ndarray:
    """Return the array of a .npy file that was read or fetched, uint8 [bytes], without a copy where it is aligned.

    Raises:
        ValueError: it is another file, holds objects or Fortran order, or is shorter than its header says.
    """
    file = io.BytesIO(content[:_MOST_HEADER].tobytes())
    shape, dtype = _header(file)
    count = math.prod(shape) * dtype.itemsize
    body = content[file.tell() : file.tell() + count]
    if len(body) < count:
        raise ValueError(f"it has {len(content)} bytes; {file.tell() + count} are needed")
    return np.require(body.view(dtype).reshape(shape), requirements="A")


def _header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any]]:
    try:
        shape, fortran, dtype = _HEADERS[npy.read_magic(file)](file)
        sizes_fit = all(type(size) is int and 0 < size < 1 << 48 for size in shape)
    except OSError:
        raise
    except Exception as error:  # NumPy parses the header with the tokenizer of Python, which raises many kinds
        raise ValueError(f"it is no .npy file: {type(error).__name__}") from None
    if fortran or dtype.hasobject or not sizes_fit or dtype.itemsize == 0:
        raise ValueError("it holds no array of numbers in C order")
    return shape, dtype
