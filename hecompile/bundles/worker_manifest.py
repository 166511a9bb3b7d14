"""Read the manifest of a worker bundle, and check the files that it lists."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hecompile.bundles.kinds import MANIFEST, MAX_MANIFEST_BYTES, WORKER_FORMAT, BundleKind, explain_mix_up
from hecompile.bundles.lowered_circuit import MAX_FEATURES_IN
from hecompile.bundles.triton_repository import config_path, model_path, weight_path
from hecompile.errors import InputError
from hecompile.files import file_sha256, missing_path_hint, read_whole, unreadable
from hecompile.foreign import parse_json
from hecompile.word_sizes import bytes_of

VERSION = 3
READABLE = (2, 3)
"""Versions that can be read; 2 counts the bytes of words, not their bits."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")
PLAN_ID = re.compile(r"[0-9a-f]{8,128}")
_REMEDY = "give the directory `worker` of what `hecompile export llama` wrote"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class BundleFile(_Record):
    """Hold size and hash of one file; `path` is relative to the bundle."""

    path: str
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class CircuitSpec(_Record):
    """Describe one linear in one direction: uint8 [upload_limbs, T, in_features] → uint8 [reply_bytes, T, out_features].

    Attributes:
        file: the ONNX file.
        data: its weight file; None for a small weight, which is in `file`.
        config: Triton's configuration; None for the exact form of a circuit.
    """

    name: str = Field(pattern=rf"^{NAME.pattern}$")
    linear: str
    direction: Literal["forward", "backward"]
    in_features: int = Field(ge=1, le=MAX_FEATURES_IN)
    out_features: int = Field(ge=1, lt=2**31)
    upload_bits: int = Field(ge=8, le=32)
    reply_bits: int = Field(ge=8, le=32)
    file: BundleFile
    data: BundleFile | None = None
    config: BundleFile | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> CircuitSpec:
        if self.reply_bits > self.upload_bits:
            raise ValueError(f"circuit {self.name} replies with {self.reply_bits} bits of {self.upload_bits}")
        if (self.config is None) != (config_path(self.name) is None):
            raise ValueError(f"circuit {self.name} {'lacks its' if self.config is None else 'has a'} config")
        return self

    @property
    def upload_limbs(self) -> int:
        """Return the bytes that hold an uploaded word."""
        return bytes_of(self.upload_bits)

    @property
    def reply_bytes(self) -> int:
        """Return the bytes that hold a returned word."""
        return bytes_of(self.reply_bits)

    def files(self) -> Iterator[tuple[BundleFile, str]]:
        """Yield each file that the circuit needs, and the path where it belongs, relative to the bundle."""
        yield self.file, model_path(self.name)
        if self.data is not None:
            yield self.data, weight_path(self.name)
        if self.config is not None:
            yield self.config, config_path(self.name) or ""


class Manifest(_Record):
    """Hold the contents of `manifest.json`."""

    format: str
    version: int
    plan_id: str = Field(pattern=rf"^{PLAN_ID.pattern}$")
    circuits: list[CircuitSpec]
    public_rows: BundleFile | None = None
    hints: list[BundleFile] | None = None


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of the bundle in `directory`.

    Raises InputError when it is no bundle, of another version, or damaged.
    """
    path = directory / MANIFEST
    if (missing := missing_path_hint(directory, _REMEDY)) is not None:
        raise InputError(missing)
    if (mix_up := explain_mix_up(directory, BundleKind.WORKER)) is not None:
        raise InputError(mix_up)
    try:
        raw = parse_json(read_whole(path, MAX_MANIFEST_BYTES))
    except FileNotFoundError:
        raise InputError(f"{directory} is not a worker bundle: {MANIFEST} is missing; {_REMEDY}") from None
    except OSError as error:
        raise unreadable(path, error, _REMEDY) from error
    except ValueError as error:  # too large, not UTF-8, not JSON, or an endless number
        raise damaged(path, f"it cannot be read ({type(error).__name__})") from error
    if not isinstance(raw, dict) or raw.get("format") != WORKER_FORMAT:
        raise InputError(f"{path} is not the manifest of a worker bundle; {_REMEDY}")
    if raw.get("version") not in READABLE:
        raise InputError(
            f"{path} has version {raw.get('version')!r}, this program reads {' and '.join(map(str, READABLE))}; "
            "compile the model again"
        )
    if raw["version"] == 2:
        raw["circuits"] = _in_bits(raw.get("circuits"))
    try:
        return Manifest.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        first = error.errors()[0]
        raise damaged(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def _in_bits(circuits: object) -> object:
    """Rewrite what version 2 says of circuits, where a word has `upload_limbs` bytes up and `reply_bytes` down."""
    if not isinstance(circuits, list):
        return circuits
    names = {"upload_limbs": "upload_bits", "reply_bytes": "reply_bits"}
    return [
        {names.get(key, key): 8 * value if key in names and type(value) is int else value for key, value in circuit.items()}
        if isinstance(circuit, dict)
        else circuit
        for circuit in circuits
    ]


def describe_bundle_file(directory: Path, path: str) -> BundleFile:
    """Hash a file of the bundle and return its record. Raises OSError as files do."""
    return BundleFile(path=path, bytes=(directory / path).stat().st_size, sha256=file_sha256(directory / path))


def check_bundle_file(directory: Path, file: BundleFile, expected_path: str) -> None:
    """Raise InputError unless `file` is recorded at `expected_path` and lies there with that size and SHA-256."""
    path = directory / expected_path
    if file.path != expected_path:
        raise damaged(directory / MANIFEST, f"it names {file.path!r} where {expected_path} belongs")
    if not path.is_file():
        raise damaged(path, "it is missing")
    try:
        if (size := path.stat().st_size) != file.bytes:
            raise damaged(path, f"it has {size} bytes instead of {file.bytes}")
        if file_sha256(path) != file.sha256:
            raise damaged(path, "its SHA-256 is not the manifest's")
    except OSError as error:
        raise unreadable(f"worker bundle file {path}", error, "copy the bundle or compile the model again") from error


def damaged(path: Path, reason: str) -> InputError:
    """Make the error for a file that is not as it was written."""
    return InputError(f"worker bundle file {path} is damaged: {reason}; copy the bundle or compile the model again")
