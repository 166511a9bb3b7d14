"""Read the worker bundle: the directory that is given to the worker, with nothing secret in it.

    manifest.json       format, version, plan_id, and for each circuit its dimensions and its files' SHA-256
    circuits/           one lowered circuit per folder, together a Triton model repository
                        (hecompile/bundles/triton_repository.py)
    public_rows.npy     only in a plan without stored hints: the matrix A in byte planes (hecompile/bundles/public_rows.py);
                        beside each circuit `<name>.exact`, with the same weight file and four bytes in and out

This module runs on the worker's machine: it and its imports know ONNX files and numbers, and neither torch nor
`hecompile.he`. `hecompile/compiler/worker_bundle_writer.py` writes the bundle.

Every bundle also holds the circuit `known_answer` (hecompile/bundles/known_answer.py), evaluated at every connection.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from hecompile.bundles.kinds import MANIFEST
from hecompile.bundles.known_answer import KNOWN_ANSWER, KNOWN_ANSWER_SHAPE, known_answer_vector, known_answer_weight
from hecompile.bundles.public_rows import PUBLIC_ROWS, open_public_rows
from hecompile.bundles.worker_manifest import (
    VERSION,
    BundleFile,
    CircuitSpec,
    check_bundle_file,
    damaged,
    read_manifest,
)
from hecompile.errors import InputError
from hecompile.integers import from_balanced_bytes

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

    @classmethod
    def open(cls, directory: str | Path) -> WorkerBundle:
        """Open a bundle after hashing every file of it. Raises InputError naming the file that is missing or damaged."""
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
        if manifest.public_rows is not None:
            check_bundle_file(directory, manifest.public_rows, PUBLIC_ROWS)
        return cls(directory, manifest.plan_id, circuits, manifest.public_rows is not None)

    def circuit_path(self, name: str) -> Path:
        """Return the path of the ONNX file of circuit `name`."""
        return self.directory / self.circuits[name].file.path

    def public_rows(self) -> np.ndarray:
        """Map the matrix A, uint8 [4, rank · ring_dim, features]. Raises InputError when there is none."""
        if not self.has_public_rows:
            raise InputError(f"worker bundle {self.directory} holds no public rows: its plan has hints on the client")
        return open_public_rows(self.directory / PUBLIC_ROWS)

    def weight(self, name: str) -> np.ndarray:
        """Return the right-hand side of circuit `name`, int8 or int16 [in_features, out_features].

        A large int8 weight is mapped from its file.
        """
        return from_balanced_bytes(self.weight_digits(name))

    def weight_digits(self, name: str) -> tuple[np.ndarray, ...]:
        """Return the weight as the circuit holds it: int8 digits in [-128, 127], lowest first, W = Σ_k digit_k · 256^k."""
        path = self.circuit_path(name)
        graph = onnx.load(path, load_external_data=False).graph
        constants = {tensor.name: tensor for tensor in graph.initializer}
        digits = dict.fromkeys(node.input[1] for node in graph.node if node.op_type == "MatMulInteger")
        return tuple(self._constant(constants[digit], path) for digit in digits)

    def _constant(self, tensor: onnx.TensorProto, circuit: Path) -> np.ndarray:
        """Return the values of `tensor`, mapped from a file if they are not in the circuit itself.

        Raises InputError for a file that is not in the bundle, or has become too short since the bundle was opened.
        """
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return onnx.numpy_helper.to_array(tensor)
        place = {entry.key: entry.value for entry in tensor.external_data}
        file = circuit.parent / place["location"]
        if not file.resolve().is_relative_to(self.directory.resolve()):
            raise InputError(f"{circuit} refers to {place['location']}, outside the bundle; copy the worker bundle again")
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        offset, shape = int(place.get("offset", 0)), tuple(tensor.dims)
        try:
            return np.memmap(file, dtype, mode="r", offset=offset, shape=shape).view(np.ndarray)
        except (OSError, ValueError) as error:  # ValueError: the file is too short
            raise InputError(f"{file} cannot be read ({error}); copy the worker bundle again") from error
