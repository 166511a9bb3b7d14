"""Find the directory of a checkpoint that is named by a path or by a hub id, and look up nothing that is a misspelt path."""

from __future__ import annotations

import re
from pathlib import Path

from hecompile.errors import InputError
from hecompile.files import explain_missing, near_neighbour

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_CONFIGURATION = ("config.json", "generation_config.json", "adapter_config.json")
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt")
_SAFETENSORS = ("model*.safetensors", "model.safetensors.index.json")
_PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
READ = (*_CONFIGURATION, *_TOKENIZER, *_SAFETENSORS, *_PICKLES)
"""The files of a checkpoint that are read, or looked for; nothing else of a hub's repository is fetched."""


def is_gguf(path: Path) -> bool:
    """Tell whether a path is that of a GGUF file."""
    return path.suffix.lower() == ".gguf" and path.is_file()


def local_path(name: str, base: Path) -> Path | None:
    """Return the path that `name` means, seen from the directory `base`, which need not exist; None for a hub id.

    A name is a path where it exists, has more than one slash or cannot be a hub id; also where its first part is a directory
    or something beside it has nearly its name. A misspelt path must not be sent to a hub.
    """
    path = base / Path(name).expanduser()
    if path.exists() or not _HUB_ID.fullmatch(name) or ".." in name:
        return path
    inside_a_directory = "/" in name and path.parent.is_dir()
    return path if inside_a_directory or near_neighbour(path) is not None else None


def find_checkpoint(name: str, whole: bool = True) -> Path:
    """Return the directory of a checkpoint, or its GGUF file; for a hub id fetch it, the configuration alone unless `whole`.

    Raises InputError for a path that is neither a directory nor a GGUF file, and for an id that the hub does not give out.
    """
    path = local_path(name, Path())
    if path is None:
        return _fetch_weights(name) if whole else _fetch(name, _CONFIGURATION)
    if not path.exists():
        raise InputError(f"no model at {explain_missing(path)}; give a directory made by save_pretrained, or a hub id")
    if not path.is_dir() and not is_gguf(path):
        raise InputError(f"model {name} is a file; give the directory that holds config.json, or a .gguf file")
    return path


def _fetch_weights(name: str) -> Path:
    """Fetch safetensors, and torch's own files where there are none."""
    directory = _fetch(name, (*_CONFIGURATION, *_TOKENIZER, *_SAFETENSORS))
    if any(True for _ in directory.glob("model*.safetensors")):
        return directory
    return _fetch(name, READ)


def _fetch(name: str, patterns: tuple[str, ...]) -> Path:
    import huggingface_hub  # slow to import, and needed for an id alone

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's client, its cache and the network raise many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"no model {name}: there is no such directory, and the hub does not give it out ({reason[:200]})"
        ) from error
