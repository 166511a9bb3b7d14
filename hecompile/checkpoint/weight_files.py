"""Find a checkpoint's weights, in whatever format they are."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from hecompile.checkpoint.folder import read_object
from hecompile.checkpoint.formats.gguf_header import GgufHeader
from hecompile.checkpoint.formats.gguf_tensors import gguf_tensors
from hecompile.checkpoint.formats.pickled import pickled_tensors
from hecompile.checkpoint.formats.safetensors_files import safetensors_tensors
from hecompile.checkpoint.formats.stored import Stored, cannot, merged
from hecompile.checkpoint.place import is_gguf
from hecompile.checkpoint.values import show
from hecompile.errors import InputError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def stored_tensors(place: Path, config: PretrainedConfig) -> dict[str, Stored]:
    """Return the tensors of a GGUF file, or of a folder by their names there: safetensors where there are any.

    Raises InputError where there are no weights; and what libraries raise for damaged files.
    """
    if is_gguf(place):
        heads = config.num_attention_heads
        return gguf_tensors(GgufHeader.read(place), heads, config.num_key_value_heads or heads)
    for whole, index, suffix, read in (
        (WEIGHTS, INDEX, ".safetensors", safetensors_tensors),
        (PICKLE, PICKLE_INDEX, ".bin", pickled_tensors),
    ):
        if (place / whole).is_file():
            return read(place / whole)
        if (place / index).is_file():
            return merged(place, ((path, read(path)) for path in _indexed_files(place / index, suffix)))
    raise cannot(place, f"there is none of {WEIGHTS}, {INDEX}, {PICKLE} and {PICKLE_INDEX}{_hint(place)}")


def _indexed_files(index: Path, suffix: str) -> list[Path]:
    """Return the files that an index names, all of its folder. Raises InputError for anything else, or a missing file."""
    shards = read_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise InputError(f"{index}: weight_map must be an object, tensor to file")
    names = list(dict.fromkeys(shards.values()))
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(suffix):
            raise InputError(f"{index}: {show(name)} is no {suffix.removeprefix('.')} file of this folder")
        if not (index.parent / name).is_file():
            raise cannot(index.parent, f"{name} is missing, which {index.name} names")
    return [index.parent / name for name in names]


def _hint(place: Path) -> str:
    if shards := sorted(path.name for pattern in ("*.safetensors", "*.bin", "*.pth") for path in place.glob(pattern)):
        return f"; {shards[0]} belongs to no index"
    return ""
