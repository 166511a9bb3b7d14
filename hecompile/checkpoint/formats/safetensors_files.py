"""Read safetensors files, a tensor at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hecompile.checkpoint.formats.stored import Stored

FLOATS = ("F64", "F32", "F16", "BF16")


def safetensors_tensors(path: Path) -> dict[str, Stored]:
    """Return the tensors of a file by name. Raises what safetensors raises for a damaged file."""

    def reader(name: str) -> Any:
        def read() -> Tensor:
            with safe_open(path, framework="pt") as file:  # its pages are let go with it, or with a tensor mapped from them
                value: Tensor = file.get_tensor(name).to(torch.float32)
                return value

        return read

    found = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  it is no mapping
            part = file.get_slice(name)
            kind = str(part.get_dtype())
            found[name] = Stored(tuple(part.get_shape()), kind, kind in FLOATS, reader(name))
    return found
