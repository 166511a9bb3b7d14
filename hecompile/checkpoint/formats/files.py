"""Find a checkpoint's weights, in whatever format they are."""

from __future__ import annotations

from pathlib import Path

from hecompile.checkpoint.formats.pickled import pickled_tensors
from hecompile.checkpoint.formats.safetensors_files import safetensors_tensors
from hecompile.checkpoint.formats.stored import Stored, cannot, indexed_files, merged

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def stored_tensors(place: Path) -> dict[str, Stored]:
    """Return the tensors of the checkpoint in a folder by their names there; safetensors where there are any.

    Raises InputError where there are no weights; and what libraries raise for damaged files.
    """
    for whole, index, suffix, read in (
        (WEIGHTS, INDEX, ".safetensors", safetensors_tensors),
        (PICKLE, PICKLE_INDEX, ".bin", pickled_tensors),
    ):
        if (place / whole).is_file():
            return read(place / whole)
        if (place / index).is_file():
            return merged(place, ((path, read(path)) for path in indexed_files(place / index, suffix)))
    raise cannot(place, f"there is none of {WEIGHTS}, {INDEX}, {PICKLE} and {PICKLE_INDEX}{_hint(place)}")


def _hint(place: Path) -> str:
    if shards := sorted(path.name for pattern in ("*.safetensors", "*.bin", "*.pth") for path in place.glob(pattern)):
        return f"; {shards[0]} belongs to no index"
    return ""
