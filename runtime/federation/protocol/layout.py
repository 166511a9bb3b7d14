"""Lay an adapter out as one vector: which matrix lies where; and name masks of its coordinates."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hecompile.errors import FederationError


@dataclass(frozen=True)
class Layout:
    """Hold names and shapes of an adapter's matrices, in the order of the names."""

    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @staticmethod
    def of(state: Mapping[str, Tensor]) -> Layout:
        """Return the layout of `AdapterModel.adapter_state()`."""
        return Layout(tuple((name, tuple(state[name].shape)) for name in sorted(state)))

    @property
    def size(self) -> int:
        """Count the coordinates of the whole adapter."""
        return sum(int(np.prod(shape)) for _, shape in self.shapes)

    def digest(self) -> str:
        """Return a hash of names and shapes, 64 hexadecimal digits."""
        text = json.dumps(self.shapes, separators=(",", ":"))
        return hashlib.sha256(b"hecompile/federation/layout/1" + text.encode()).hexdigest()

    def slices(self) -> list[tuple[str, slice]]:
        """Return where each matrix lies, by name."""
        result, start = [], 0
        for name, shape in self.shapes:
            size = int(np.prod(shape))
            result.append((name, slice(start, start + size)))
            start += size
        return result

    def flatten(self, state: Mapping[str, Tensor]) -> NDArray[np.float32]:
        """Return the vector, float32 `[size]`. Raises FederationError for a matrix that is missing or of another shape."""
        for name, shape in self.shapes:
            if name not in state or tuple(state[name].shape) != shape:
                found = list(state[name].shape) if name in state else "missing"
                raise FederationError(
                    f"the adapter's {name} is {found}, the federation's {list(shape)}: another LoRA rank or target?"
                )
        if len(state) != len(self.shapes):
            raise FederationError(f"the adapter has {len(state)} matrices, the federation's {len(self.shapes)}")
        return torch.cat([state[name].detach().reshape(-1).float() for name, _ in self.shapes]).numpy()

    def unflatten(self, vector: NDArray[np.float32]) -> dict[str, Tensor]:
        """Return the matrices of a vector `[size]` as float32 copies, by name."""
        whole = torch.from_numpy(np.array(vector, dtype=np.float32))
        shapes = dict(self.shapes)
        return {name: whole[where].reshape(shapes[name]).clone() for name, where in self.slices()}


def adapter_digest(adapter: NDArray[np.float32]) -> str:
    """Return a hash of an adapter float32 `[size]` as it travels, 64 hexadecimal digits."""
    return hashlib.sha256(b"hecompile/federation/adapter/1" + adapter.astype("<f4").tobytes()).hexdigest()


def mask_digest(mask: NDArray[np.bool_]) -> str:
    """Return a hash of a mask bool `[n]`, 64 hexadecimal digits."""
    packed = np.packbits(mask).tobytes()
    return hashlib.sha256(b"hecompile/federation/mask/1" + len(mask).to_bytes(8, "little") + packed).hexdigest()
