"""What a directory is that was given for a bundle and is none of the kind that was wanted.

Two commands make bundles, each a client's half and a worker's half, and the folder that holds both is easily given in place
of one. An error that only says which file is missing sends people to export again what is in order.
"""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path

MANIFEST = "manifest.json"
PLAN, CIRCUIT, TABLE = "plan.json", "circuit.onnx", "embeddings.npy"
CLIENT_FORMAT, WORKER_FORMAT = "hecompile-client", "hecompile-worker-bundle"


class BundleKind(Enum):
    """Whose half, what wrote it, and which command takes it."""

    CLIENT = ("client", "export llama", "`hecompile train` and `hecompile infer` take")
    WORKER = ("worker", "export llama", "`hecompile worker serve {}` serves")
    CKKS_CLIENT = ("client", "ckks export", "`hecompile infer {} --worker ADDRESS` takes")
    CKKS_WORKER = ("worker", "ckks export", "`hecompile ckks serve {} --listen ADDRESS` serves")

    @property
    def half(self) -> str:
        """The folder's name in what the command wrote."""
        return self.value[0]

    @property
    def command(self) -> str:
        """Of `hecompile`, that writes it."""
        return self.value[1]

    def __str__(self) -> str:
        return f"{'CKKS ' if self.command == 'ckks export' else ''}{self.half} bundle"

    def used(self, directory: Path) -> str:
        """What it is, and what takes it."""
        _, command, use = self.value
        return f"a {self} of `hecompile {command}`, which {use.format(directory)}"


def kind_of(directory: Path) -> BundleKind | None:
    """By what its manifest says of itself, whatever the version and the state of the rest; the halves of a CKKS bundle have
    one plan, and are told apart by the file that only one of them has."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        named = {CLIENT_FORMAT: BundleKind.CLIENT, WORKER_FORMAT: BundleKind.WORKER}
        if isinstance(manifest, dict) and (found := named.get(str(manifest.get("format")))) is not None:
            return found
    except (OSError, ValueError, RecursionError):
        pass  # none, or of something else
    for file, kind in ((CIRCUIT, BundleKind.CKKS_WORKER), (TABLE, BundleKind.CKKS_CLIENT)):
        if (directory / PLAN).is_file() and (directory / file).is_file():
            return kind
    return None


def mistaken(directory: Path, wanted: BundleKind) -> str | None:
    """What to say to somebody who gave `directory` for a `wanted` bundle: what it is, and the directory that was probably
    meant; None where there is nothing to say."""
    inside, beside = directory / wanted.half, directory.parent / wanted.half
    here = kind_of(directory)
    if here is None and kind_of(inside) is wanted:
        return f"{directory} is not a {wanted} itself; did you mean {inside}?"
    for place in (directory, inside):
        found = kind_of(place)
        if found not in (None, wanted):
            meant = f"; did you mean {beside}?" if kind_of(beside) is wanted else ""
            return f"{place} is {found.used(place)}; a {wanted} is wanted here{meant or _made(wanted)}"
    return None


def _made(wanted: BundleKind) -> str:
    return f": the directory `{wanted.half}` of what `hecompile {wanted.command}` wrote"


CLIENT, WORKER = "client", "worker"
