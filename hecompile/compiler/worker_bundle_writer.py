"""Write a worker bundle (`hecompile.bundles.worker`) one circuit at a time.

Memory so holds one weight however large the model is. A bundle is written beside its destination and renamed into place
whole. Its bytes are a function of its circuits and its plan id.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir

from hecompile.bundles.kinds import MANIFEST, WORKER_FORMAT
from hecompile.bundles.known_answer import (
    KNOWN_ANSWER,
    KNOWN_ANSWER_BITS,
    KNOWN_ANSWER_REPLY_BITS,
    known_answer_weight,
)
from hecompile.bundles.public_rows import PUBLIC_ROWS, WORD_BYTES, base_name
from hecompile.bundles.triton_repository import WEIGHT_FILE, config_path, model_path, triton_config, weight_path
from hecompile.bundles.worker import WorkerBundle
from hecompile.bundles.worker_manifest import (
    NAME,
    PLAN_ID,
    VERSION,
    BundleFile,
    CircuitSpec,
    Manifest,
    check_bundle_file,
    describe_bundle_file,
)
from hecompile.compiler.pipeline import lower_circuit
from hecompile.errors import InputError, LegalityError
from hecompile.files import reason_of
from hecompile.he.public_matrix import PublicMatrix
from hecompile.passes.offload.lower_worker import LowerWorker
from hecompile.plan.encrypted_linear import REPLY_BITS, UPLOAD_BITS, encrypted_linear_model

EXTERNAL_DATA_THRESHOLD = 65536
"""Weights above this many bytes go to a file of their own, which the engines can map into memory."""

_CHUNK = 256
"""Rows of A expanded at a time: 1.5 MiB of words at lattice dimension 1536."""


class WorkerBundleWriter:
    """Write a bundle into a temporary sibling of `directory`; `commit` renames it into place.

    Use it as a context manager: leaving it without `commit` removes everything, unless the process is killed.
    Raises InputError when `directory` already exists and is not empty, or cannot be written.

    With `keep`, the caller looks after the folder: everything written stays, and the next writer of the same directory
    can count complete circuits as added (`add_complete`).
    """

    def __init__(self, directory: str | Path, plan_id: str, keep: bool = False) -> None:
        if not PLAN_ID.fullmatch(plan_id):
            raise InputError(f"plan_id {plan_id!r} is not 8 to 128 lowercase hex digits")
        self._target = Path(directory)
        self._keep = keep
        self._temporary = self._target.parent / f".{self._target.name}.{'kept' if keep else os.getpid()}.partial"
        if keep and self._target.exists() and not self._temporary.exists():
            self._target.rename(self._temporary)  # committed, but what it is a part of was interrupted after that
        if self._target.exists() and (not self._target.is_dir() or any(self._target.iterdir())):
            raise InputError(f"worker bundle {self._target} exists already; remove it or choose another directory")
        self._plan_id = plan_id
        self._circuits: dict[str, CircuitSpec] = {}
        self._public_rows: BundleFile | None = None
        self._hints: list[BundleFile] = []
        with _writing(self._target):
            self._temporary.mkdir(parents=True, exist_ok=keep)

    def __enter__(self) -> WorkerBundleWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._keep:
            shutil.rmtree(self._temporary, ignore_errors=True)

    @property
    def folder(self) -> Path:
        """Return where the bundle is made; it is renamed to its directory at the end."""
        return self._temporary

    def add_hint(self, file: BundleFile) -> None:
        """List a file of hints that stands in `folder` already, for the client to fetch."""
        self._hints.append(file)

    def add_complete(self, spec: CircuitSpec) -> list[Path] | None:
        """Count a circuit that an earlier writer with `keep` completed as added.

        Returns its files, or None where one is not intact.
        """
        files = []
        for file, path in spec.files():
            try:
                check_bundle_file(self._temporary, file, path)
            except InputError:
                return None
            files.append(self._temporary / path)
        self._circuits[spec.name] = spec
        return files

    def add(self, model: ir.Model) -> CircuitSpec:
        """Write one lowered circuit, named `<linear>.<direction>` by its graph's name; the model can be freed after.

        A circuit `<linear>.<direction>.exact` is written without its weight and shares that of `<linear>.<direction>`,
        which must be there. Raises LegalityError when it is not a lowered circuit, or its name is of another form or taken.
        """
        name = model.graph.name or ""
        linear, _, direction = base_name(name).rpartition(".")
        if not NAME.fullmatch(name) or not linear or direction not in ("forward", "backward"):
            raise LegalityError(f"circuit name {name!r} is not <linear>.forward or <linear>.backward")
        return self._add(model, name, linear, "forward" if direction == "forward" else "backward")

    def add_public_rows(self, public: PublicMatrix, features: int) -> None:
        """Write the first `features` rows of A, for circuits with at most as many inputs."""
        with _writing(self._target):
            write_public_rows(self._temporary / PUBLIC_ROWS, public, features)
            self._public_rows = describe_bundle_file(self._temporary, PUBLIC_ROWS)

    def commit(self, order: Sequence[str] = ()) -> WorkerBundle:
        """Add the known-answer circuit, write the manifest, rename the bundle into place and return it.

        The manifest has the circuits named in `order` first, then the others as they were added.
        """
        weight = known_answer_weight(self._plan_id)
        model = encrypted_linear_model(weight, KNOWN_ANSWER_BITS, KNOWN_ANSWER_REPLY_BITS, KNOWN_ANSWER)
        self._add(lower_circuit(model), KNOWN_ANSWER, KNOWN_ANSWER, "forward")
        names = [*order, *(name for name in self._circuits if name not in set(order))]
        circuits = [self._circuits[name] for name in names]
        manifest = Manifest(
            format=WORKER_FORMAT,
            version=VERSION,
            plan_id=self._plan_id,
            circuits=circuits,
            public_rows=self._public_rows,
            hints=sorted(self._hints, key=lambda file: file.path) or None,
        )
        with _writing(self._target):
            text = json.dumps(manifest.model_dump(exclude_none=True), indent=1) + "\n"
            (self._temporary / MANIFEST).write_text(text, encoding="utf-8")
            self._temporary.rename(self._target)
        hints = {Path(file.path).stem: file for file in self._hints}
        return WorkerBundle(self._target, self._plan_id, dict(self._circuits), self._public_rows is not None, hints)

    def _add(self, model: ir.Model, name: str, linear: str, direction: Literal["forward", "backward"]) -> CircuitSpec:
        if name in self._circuits:
            raise LegalityError(f"circuit {name} is in the bundle already")
        LowerWorker().ensures(model)
        (upload_limbs, in_features), (reply_bytes, out_features) = _dimensions(model)
        # Not written to the ONNX file, which is one of bytes.
        upload_bits = int(model.metadata_props.pop(UPLOAD_BITS, 8 * upload_limbs))
        reply_bits = int(model.metadata_props.pop(REPLY_BITS, 8 * reply_bytes))
        path, base = self._temporary / model_path(name), base_name(name)
        with _writing(self._target):
            path.parent.mkdir(parents=True, exist_ok=True)
            has_data = in_features * out_features > EXTERNAL_DATA_THRESHOLD
            external = WEIGHT_FILE if has_data else None
            if has_data and base != name:
                if base not in self._circuits:
                    raise LegalityError(f"circuit {name} needs {base} to be written first")
                share_weight(model, self._temporary / model_path(base))
                external = None
            ir.save(model, path, external_data=external, size_threshold_bytes=EXTERNAL_DATA_THRESHOLD)
            file = describe_bundle_file(self._temporary, model_path(name))
            data = describe_bundle_file(self._temporary, weight_path(name)) if has_data else None
            config = None
            if (config_file := config_path(name)) is not None:
                text = triton_config(name, upload_limbs, in_features, reply_bytes, out_features, self._plan_id)
                (self._temporary / config_file).write_text(text, encoding="utf-8")
                config = describe_bundle_file(self._temporary, config_file)
        self._circuits[name] = CircuitSpec(
            name=name,
            linear=linear,
            direction=direction,
            in_features=in_features,
            out_features=out_features,
            upload_bits=upload_bits,
            reply_bits=reply_bits,
            file=file,
            data=data,
            config=config,
        )
        return self._circuits[name]


def _dimensions(model: ir.Model) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return ((upload_limbs, in_features), (reply_bytes, out_features)), from the shapes of the graph's input and output."""
    sides = []
    for values in (model.graph.inputs, model.graph.outputs):
        shape = values[0].shape if len(values) == 1 else None
        if shape is None or len(shape) != 3 or not isinstance(shape[0], int) or not isinstance(shape[2], int):
            raise LegalityError(f"circuit {model.graph.name} has no single input and output of rank 3 with known sizes")
        sides.append((shape[0], shape[2]))
    return sides[0], sides[1]


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write worker bundle {target}: {reason_of(error)}") from error


def share_weight(exact: ir.Model, base: Path) -> None:
    """Make the lowered circuit `exact` refer to the weight file of the circuit in `base`, of which it is the exact form.

    Raises LegalityError where the weights differ in shape or type.
    """
    own, stored = _weight_digits(exact), _weight_digits(ir.load(base))
    for value, other in zip(own, stored, strict=True):
        assert value.const_value is not None and other.const_value is not None
        if value.const_value.shape != other.const_value.shape or value.dtype != other.dtype:
            raise LegalityError(f"circuit {exact.graph.name}: its weight is not that of {base.name}")
        value.const_value = other.const_value


def _weight_digits(model: ir.Model) -> list[ir.Value]:
    """List the int8 constants of a lowered circuit, lowest digit first."""
    digits = [node.inputs[1] for node in model.graph if node.op_type == "MatMulInteger"]
    return list(dict.fromkeys(digit for digit in digits if digit is not None))


def write_public_rows(path: Path, public: PublicMatrix, features: int) -> None:
    """Write uint8 [4, rank · ring_dim, features]: the bytes of the first `features` rows of A, lowest plane first.

    Raises OSError as files do, InputError where A has fewer rows.
    """
    if features > public.rows:
        raise InputError(f"the public matrix has {public.rows} rows, {features} are wanted")
    shape = (WORD_BYTES, public.params.lattice_dim, features)
    planes = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    for start in range(0, features, _CHUNK):
        rows = slice(start, min(start + _CHUNK, features))
        words = public.coefficients(rows).reshape(rows.stop - start, -1).numpy()  # int32 [rows, rank · d], little-endian
        word_bytes = words.view(np.uint8).reshape(*words.shape, WORD_BYTES)
        planes[:, :, rows] = word_bytes.transpose(2, 1, 0)  # [4, rank · d, rows]
    planes.flush()
