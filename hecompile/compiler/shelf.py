"""Keep what an export makes of the weights on the disk until it is written: memory then holds a matrix at a time."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from hecompile.graph.lazy import lazy_tensor

_SMALL = 2**16
"""Elements under which an array stays in memory."""


class Shelf:
    """Keep arrays in files of `folder`, which are removed with it.

    Both methods are what passes take (`hecompile.graph.lazy.Keep` and `KeepRows`). Raises OSError where the disk is full.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def keep(self, name: str, array: np.ndarray) -> ir.TensorProtocol:
        """Put an array on the disk; it is read as a whole whenever it is wanted."""
        if array.size < _SMALL:
            return ir.Tensor(array, name=name)
        path, shape, dtype = self._folder / f"{name}.bin", array.shape, array.dtype
        np.ascontiguousarray(array).tofile(path)
        return lazy_tensor(name, shape, dtype, lambda: np.fromfile(path, dtype).reshape(shape))

    def keep_rows(self, name: str, rows: Tensor) -> Tensor:
        """Put float32 [T, features] on the disk, and return it mapped from there; its file goes with it."""
        if rows.numel() < _SMALL:
            return rows
        with tempfile.TemporaryFile(dir=self._folder) as file:
            file.write(rows.contiguous().numpy().data)
            file.flush()
            return torch.from_numpy(np.memmap(file, dtype=np.float32, mode="r+", shape=tuple(rows.shape)))
