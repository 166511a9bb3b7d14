"""Look over what lies in a checkpoint's folder before a library reads it.

Libraries do more than they are asked to: they attach an adapter that lies beside the weights, unpickle, import code that a
file names, and follow links and paths. Files that would have one of them do so are refused here, by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from hecompile.checkpoint.families import SUPPORTED
from hecompile.checkpoint.place import READ
from hecompile.errors import InputError
from hecompile.files import reason_of

CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG = "config.json", "generation_config.json", "tokenizer_config.json"
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def check_folder(directory: Path) -> None:
    """Refuse what a checkpoint's folder must not hold. Raises InputError naming the file.

    An adapter beside the weights would go into the worker's public circuits, or be left out against its owner's wish: which
    of the two is meant cannot be seen. A link may lead to a file that was never meant to be made public.
    """
    for name in _ADAPTER:
        if (directory / name).exists():
            raise InputError(
                f"{directory / name} is an adapter in the folder of a model, whose weights are to be public. Move the "
                "adapter into a folder of its own; to make it part of the model, merge it and save the result"
            )
    if not (directory / CONFIG).is_file():
        found = sorted(directory.glob("*.gguf"))
        hint = f"give the file {found[0]}" if found else "is it a save_pretrained directory?"
        raise InputError(f"model directory {directory} has no {CONFIG}; {hint}")
    check_links(directory, READ)


def check_links(directory: Path, patterns: Iterable[str] = ("*",)) -> None:
    """Refuse links to outside of `directory` among its files of these names. Raises InputError naming the first.

    The hub's cache is made of links, from snapshots/REVISION to blobs/HASH, which are let pass.
    """
    inside = [directory.resolve()]
    if inside[0].parent.name == "snapshots":
        inside.append(inside[0].parent.parent / "blobs")
    for path in sorted(directory.iterdir()):
        if not path.is_symlink() or not any(fnmatch(path.name, pattern) for pattern in patterns):
            continue
        target = path.resolve()
        if not any(target.is_relative_to(folder) for folder in inside):
            raise InputError(
                f"{path} is a link to {target}, outside of its folder: copy the file there, or delete the link"
            )


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises InputError naming the file where it cannot be read or is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} cannot be read: {reason_of(error)}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {reason_of(error)}") from None
    except RecursionError:
        raise InputError(f"{path} is not valid JSON: its values are nested too deeply") from None
    except ValueError as error:  # also an integer of more digits than Python reads
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def refuse_code(path: Path, content: Mapping[str, Any], known: Iterable[str] = ()) -> None:
    """Refuse a configuration that names Python code to be run. Raises InputError.

    known: names of classes that transformers has taken over since: its own take their place, and the model's are not run.
    """
    code = content.get("auto_map")
    if not code or (isinstance(code, Mapping) and all(value in tuple(known) for value in code.values())):
        return
    raise InputError(
        f"{path}: auto_map names Python code of the model's own, which is never run; supported: {SUPPORTED}"
    )
