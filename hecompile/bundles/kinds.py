"""Recognise bundle directories and explain mix-ups.

Two commands make bundles, each a client's half and a worker's half, and the folder that holds both is easily given in place
of one. An error that only names a missing file would send people to export again although their bundle is in order.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path

from hecompile.files import missing_path_hint, read_whole
from hecompile.foreign import parse_json

MAX_MANIFEST_BYTES = 1 << 26
"""Largest manifest that is read; a circuit takes about a kilobyte of it."""
MANIFEST = "manifest.json"
PLAN, CIRCUIT, TABLE = "plan.json", "circuit.onnx", "embeddings.npy"
CLIENT_FORMAT, WORKER_FORMAT = "hecompile-client", "hecompile-worker-bundle"


class BundleKind(Enum):
    """Tell the kinds of bundles apart: whose half it is, which command wrote it, and which command takes it."""

    CLIENT = ("client", "export llama", "`hecompile train` and `hecompile infer` take")
    WORKER = ("worker", "export llama", "`hecompile worker serve {}` serves")
    CKKS_CLIENT = ("client", "ckks export", "`hecompile infer {} --worker ADDRESS` takes")
    CKKS_WORKER = ("worker", "ckks export", "`hecompile ckks serve {} --listen ADDRESS` serves")

    @property
    def half(self) -> str:
        """Return the name of its folder in an export."""
        return self.value[0]

    @property
    def command(self) -> str:
        """Return the command of `hecompile` that writes it."""
        return self.value[1]

    def __str__(self) -> str:
        return f"{'CKKS ' if self.command == 'ckks export' else ''}{self.half} bundle"

    def describe(self, directory: Path) -> str:
        """Say which command wrote a bundle of this kind in `directory`, and which takes it."""
        _, command, use = self.value
        return f"a {self} of `hecompile {command}`, which {use.format(directory)}"


def kind_of(directory: Path) -> BundleKind | None:
    """Recognise a bundle by its manifest, of any version and even if other files are damaged; None where it is no bundle.

    The halves of a CKKS bundle have one plan, and are told apart by the file that only one of them has.
    """
    try:
        manifest = parse_json(read_whole(directory / MANIFEST, MAX_MANIFEST_BYTES))
        named = {CLIENT_FORMAT: BundleKind.CLIENT, WORKER_FORMAT: BundleKind.WORKER}
        if isinstance(manifest, dict) and (found := named.get(str(manifest.get("format")))) is not None:
            return found
    except (OSError, ValueError):
        pass  # no manifest, or one of something else
    for file, kind in ((CIRCUIT, BundleKind.CKKS_WORKER), (TABLE, BundleKind.CKKS_CLIENT)):
        if (directory / PLAN).is_file() and (directory / file).is_file():
            return kind
    return None


def explain_mix_up(directory: Path, wanted: BundleKind) -> str | None:
    """Explain that `directory` is another kind of bundle than `wanted`, and name the directory that was probably meant.

    Also that there is nothing at all. None where it is of that kind, or nothing is known of it.
    """
    if (missing := missing_path_hint(directory)) is not None:
        return missing
    inside, beside = directory / wanted.half, directory.parent / wanted.half
    here = kind_of(directory)
    if here is None and kind_of(inside) is wanted:
        return f"{directory} is not a {wanted} itself; did you mean {inside}?"
    for place in (directory, inside):
        found = kind_of(place)
        if found not in (None, wanted):
            meant = f"; did you mean {beside}?" if kind_of(beside) is wanted else ""
            return f"{place} is {found.describe(place)}; a {wanted} is needed here{meant or _origin(wanted)}"
    return None


def _origin(wanted: BundleKind) -> str:
    return f": the directory `{wanted.half}` of what `hecompile {wanted.command}` wrote"


CLIENT, WORKER = "client", "worker"
