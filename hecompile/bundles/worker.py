"""Read the worker bundle: the directory that is given to the worker, with nothing secret in it.

    manifest.json       format, version, plan_id, and for each circuit its dimensions and its files' SHA-256
    circuits/           one lowered circuit per folder, together a Triton model repository
                        (hecompile/bundles/triton_repository.py)
    public_rows.npy     only in a plan without stored hints: the matrix A in byte planes (hecompile/bundles/public_rows.py);
                        beside each circuit `<name>.exact`, with the same weight file and four bytes in and out
    hints/              only in a plan whose client fetches them: one file per circuit (hecompile/bundles/hint_files.py)

This module runs on the worker's machine: it and its imports know ONNX files and numbers, and neither torch nor
`hecompile.he`. `hecompile/compiler/worker_bundle_writer.py` writes the bundle.

Every bundle also holds the circuit `known_answer` (hecompile/bundles/known_answer.py), evaluated at every connection.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hecompile.bundles.hint_files import hint_path
from hecompile.bundles.kinds import MANIFEST
from hecompile.bundles.known_answer import KNOWN_ANSWER, KNOWN_ANSWER_SHAPE, known_answer_vector, known_answer_weight
from hecompile.bundles.lowered_circuit import CircuitError, StoredDigit, read_circuit
from hecompile.bundles.public_rows import PUBLIC_ROWS, base_name, open_public_rows
from hecompile.bundles.triton_repository import model_path, weight_path
from hecompile.bundles.worker_manifest import (
    VERSION,
    BundleFile,
    CircuitSpec,
    check_bundle_file,
    damaged,
    read_manifest,
)
from hecompile.errors import InputError
from hecompile.files import unreadable
from hecompile.integers import from_balanced_bytes
from hecompile.mapped_files import map_array

__all__ = [
    "KNOWN_ANSWER",
    "KNOWN_ANSWER_SHAPE",
    "MANIFEST",
    "VERSION",
    "BundleFile",
    "CircuitSpec",
    "WorkerBundle",
    "known_answer_vector",
    "known_answer_weight",
]


@dataclass(frozen=True)
class WorkerBundle:
    """Hold an opened bundle: its directory, the plan it belongs to and its circuits by name."""

    directory: Path
    plan_id: str
    circuits: dict[str, CircuitSpec]
    has_public_rows: bool = False
    hints: dict[str, BundleFile] = field(default_factory=dict)

    @classmethod
    def open(cls, directory: str | Path) -> WorkerBundle:
        """Open a bundle after hashing every file of it, and checking that each circuit is what its entry says.

        Raises InputError naming the file that is missing or damaged.
        """
        directory = Path(directory)
        manifest = read_manifest(directory)
        circuits = {spec.name: spec for spec in manifest.circuits}
        if len(circuits) != len(manifest.circuits):
            raise damaged(directory / MANIFEST, "two circuits have one name")
        if KNOWN_ANSWER not in circuits:
            raise damaged(directory / MANIFEST, f"the circuit {KNOWN_ANSWER} is missing")
        for spec in manifest.circuits:
            for file, path in spec.files():
                check_bundle_file(directory, file, path)
            stored_digits(directory, spec)
        hints = {Path(file.path).stem: file for file in manifest.hints or ()}
        for name, file in hints.items():
            if name not in circuits:
                raise damaged(directory / MANIFEST, f"it has a hint of {name}, which is no circuit of it")
            check_bundle_file(directory, file, hint_path(name))
        bundle = cls(directory, manifest.plan_id, circuits, manifest.public_rows is not None, hints)
        if manifest.public_rows is not None:
            check_bundle_file(directory, manifest.public_rows, PUBLIC_ROWS)
            bundle.public_rows()
        return bundle

    def circuit_path(self, name: str) -> Path:
        """Return the path of the ONNX file of circuit `name`."""
        return self.directory / self.circuits[name].file.path

    def public_rows(self) -> np.ndarray:
        """Map the matrix A, uint8 [4, rank · ring_dim, features], as wide as the widest circuit that is multiplied by it.

        Raises InputError when there is none, or a narrower one.
        """
        if not self.has_public_rows:
            raise InputError(f"worker bundle {self.directory} holds no public rows: its plan has hints on the client")
        exact = [spec for name, spec in self.circuits.items() if base_name(name) != name]
        return open_public_rows(self.directory / PUBLIC_ROWS, max((spec.in_features for spec in exact), default=0))

    def hint_file(self, name: str) -> np.ndarray:
        """Map the file of a circuit's hint, uint8 [bytes].

        Raises InputError when the bundle has none, or it cannot be read.
        """
        if name not in self.hints or name not in self.circuits:
            raise InputError(
                f"the worker bundle has no hint of {name!r}: only one that was exported with --hints fetched has hints"
            )
        path = self.directory / hint_path(name)
        try:
            return map_array(path, np.uint8, (self.hints[name].bytes,), 0)
        except (OSError, ValueError) as error:
            raise unreadable(f"the hint of {name}", error, "copy the worker bundle again") from error

    def weight(self, name: str) -> np.ndarray:
        """Return the right-hand side of circuit `name`, int8 or int16 [in_features, out_features].

        A large int8 weight is mapped from its file.
        """
        return from_balanced_bytes(self.weight_digits(name))

    def weight_digits(self, name: str) -> tuple[np.ndarray, ...]:
        """Return the weight as the circuit holds it: int8 digits in [-128, 127], lowest first, W = Σ_k digit_k · 256^k.

        Each is [in_features, out_features] of the manifest's entry, in C order and read-only. A large one is mapped from its
        file.

        Raises:
            InputError: the files are not those of the circuit any more.
        """
        spec = self.circuits[name]
        shape, file = (spec.in_features, spec.out_features), self.directory / weight_path(name)
        digits = []
        for digit in stored_digits(self.directory, spec):
            try:
                if digit.content is None:
                    digits.append(map_array(file, np.int8, shape, digit.offset))
                else:
                    digits.append(np.frombuffer(digit.content, dtype=np.int8).reshape(shape))
            except (OSError, ValueError) as error:  # ValueError: the file is too short
                raise unreadable(file, error, "copy the worker bundle again") from error
        return tuple(digits)


def stored_digits(directory: Path, spec: CircuitSpec) -> tuple[StoredDigit, ...]:
    """Check that the ONNX file of a circuit is the one that its entry in the manifest describes; return its weight's places.

    Raises InputError where it is another, whatever is in it.
    """
    path = directory / model_path(spec.name)
    try:
        digits = read_circuit(path, spec, 0 if spec.data is None else spec.data.bytes)
        weight = (directory / weight_path(spec.name)).resolve()
        if any(digit.content is None for digit in digits) and not weight.is_relative_to(directory.resolve()):
            raise CircuitError("its weight file is a link that leads outside the bundle")
        return digits
    except CircuitError as error:
        raise damaged(path, str(error)) from error
    except Exception as error:  # a parser may raise anything for bytes that somebody made up
        raise unreadable(path, error, "copy the worker bundle again") from error
