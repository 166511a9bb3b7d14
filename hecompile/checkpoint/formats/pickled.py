"""Read torch's own files (`pytorch_model.bin`): pickles of which nothing but tensors is taken.

torch.load(weights_only=True) runs no code that a pickle names: anything but tensors and containers of them is refused. The
file is mapped, so that a tensor is read when it is wanted. Before it is opened the archive is looked over: entries are
stored without compression, and the pickle itself is small, so that a file cannot grow in memory.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hecompile.checkpoint.formats.stored import Stored, cannot

_MOST_PICKLE_BYTES = 1 << 26
"""Bound of the pickle, which has names and shapes; the values lie beside it."""
_MOST_ENTRIES = 1 << 17
_SAFER = "load it where you trust it, and save it as safetensors"


def pickled_tensors(path: Path) -> dict[str, Stored]:
    """Return the tensors of a file by name. Raises InputError for what is no plain file of tensors."""
    _check_archive(path)
    return {_checked_name(path, name): _stored(path, name, value) for name, value in _content(path).items()}


def _content(path: Path) -> Mapping[Any, Any]:
    """Open a file: its pickle is read, the tensors' values are mapped. Raises InputError for what holds no named tensors."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = "its pickle names code, which is not run"
        raise cannot(path.parent, f"{path.name} holds more than tensors ({reason}); {_SAFER}") from error
    if not isinstance(content, Mapping):
        raise cannot(path.parent, f"{path.name} holds no tensors by name; {_SAFER}")
    return content


def _check_archive(path: Path) -> None:
    """Refuse an archive that would be unpacked, or whose pickle is large. Raises InputError."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        reason = "is no archive of torch's (from version 1.6 on), or is not complete"
        raise cannot(path.parent, f"{path.name} {reason}; {_SAFER}") from None
    packed = [entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1]
    sizes = sum(entry.file_size for entry in entries)
    if packed or len(entries) > _MOST_ENTRIES or sizes > path.stat().st_size:
        raise cannot(path.parent, f"{path.name} is packed, which torch's own files are not; {_SAFER}")
    for entry in entries:
        if entry.filename.endswith(".pkl") and entry.file_size > _MOST_PICKLE_BYTES:
            raise cannot(path.parent, f"the pickle in {path.name} has {entry.file_size} bytes; {_SAFER}")


def _checked_name(path: Path, name: Any) -> str:
    if not isinstance(name, str):
        raise cannot(path.parent, f"{path.name} holds something without a name; {_SAFER}")
    return name


def _stored(path: Path, name: Any, value: Any) -> Stored:
    plain = type(value) in (Tensor, torch.nn.Parameter) and value.layout is torch.strided and value.device.type == "cpu"
    if not plain or value.is_quantized:
        raise cannot(path.parent, f"{name} in {path.name} is no plain tensor; {_SAFER}")
    shape, kind = tuple(value.shape), str(value.dtype).removeprefix("torch.")
    if value.dtype == torch.float32:
        return Stored(shape, kind, True, lambda: value.detach().contiguous())  # mapped: pages are the system's to drop

    def read() -> Tensor:
        converted: Tensor = _content(path)[name].detach().to(torch.float32)  # its pages are let go with the content
        return converted.contiguous()

    return Stored(shape, kind, value.is_floating_point(), read)
