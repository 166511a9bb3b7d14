"""Read the bundles of a polynomial plan, which a worker evaluates under CKKS."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from pydantic import TypeAdapter

from hecompile.array_files import map_npy
from hecompile.bundles.kinds import CIRCUIT, MAX_MANIFEST_BYTES, PLAN, TABLE, BundleKind, explain_mix_up
from hecompile.ckks.circuit import PolynomialCircuit
from hecompile.ckks.parameters import CkksParameters
from hecompile.errors import HecompileError, InputError
from hecompile.files import missing_path_hint, read_whole, unreadable
from hecompile.foreign import parse_json

FORMAT = "hecompile-ckks-1"
MAX_CIRCUIT_BYTES = (1 << 31) - 1
"""What protobuf can hold."""


@dataclass(frozen=True)
class CkksPlan:
    """Hold the contents of plan.json. refreshes: name of each refreshed value → its shape, the batch axis being 1."""

    model: str
    plan_id: str
    parameters: dict[str, int]
    sequence_length: int
    last_only: bool
    hidden: int
    vocabulary: int
    depth: int
    refreshes: dict[str, list[int]]

    def __post_init__(self) -> None:
        """Raise ValueError for a size that no plan has; the sizes of messages follow from them."""
        shapes = self.refreshes.values() if isinstance(self.refreshes, dict) else ()
        sizes = [self.sequence_length, self.hidden, self.vocabulary, *(size for shape in shapes for size in shape)]
        if not all(type(size) is int and 0 < size < 1 << 31 for size in sizes):
            raise ValueError("a size of the plan is not a positive integer")

    @classmethod
    def read(cls, directory: str | Path) -> CkksPlan:
        """Read the plan in a bundle. Raises InputError naming what is wrong."""
        path = Path(directory) / PLAN
        try:
            fields = parse_json(read_whole(path, MAX_MANIFEST_BYTES))
            if fields.pop("format") != FORMAT:
                raise ValueError
            cls(**fields)  # no field is missing or unknown; their types are checked next
            return TypeAdapter(cls).validate_json(json.dumps(fields), strict=True)
        except OSError:
            mix_up = explain_mix_up(Path(directory), BundleKind.CKKS_CLIENT)
            none = f"{directory} is no polynomial bundle (no {PLAN}); make one with `hecompile ckks export`"
            missing = missing_path_hint(directory, "make one with `hecompile ckks export`")
            raise InputError(missing or mix_up or none) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise InputError(f"{path} is not a plan of this version; export again") from None

    def write(self, directory: Path) -> None:
        """Write plan.json to a directory."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"
        (directory / PLAN).write_text(text, encoding="utf-8")


def is_polynomial_plan(directory: str | Path) -> bool:
    """Tell whether a client's bundle is one of `export_polynomial`, of any version."""
    return (Path(directory) / PLAN).is_file()


def is_polynomial_bundle(directory: str | Path) -> bool:
    """Tell whether `export_polynomial`, of any version, wrote a directory or the folder that it is in."""
    parts = (Path(directory), Path(directory) / "client", Path(directory) / "worker")
    return any(is_polynomial_plan(part) for part in parts)


def read_table(directory: str | Path, plan: CkksPlan) -> NDArray[np.float32]:
    """Read the client's embeddings, float32 [V, H]. Raises InputError when they are not those of the plan."""
    path = Path(directory) / TABLE
    try:
        table = map_npy(path)
    except (OSError, ValueError) as error:
        if (mix_up := explain_mix_up(Path(directory), BundleKind.CKKS_CLIENT)) is not None:
            raise InputError(mix_up) from error
        raise unreadable(path, error, "export again") from error
    if table.shape != (plan.vocabulary, plan.hidden) or table.dtype != np.float32:
        raise InputError(f"{path} is not the table of the plan; export again")
    return np.array(table)


def open_worker(directory: str | Path) -> tuple[CkksPlan, PolynomialCircuit, CkksParameters]:
    """Open the worker's half: its plan, circuit and parameters.

    Raises:
        InputError: the circuit is not the one of the plan.
        SecurityError: the parameters have less than 128 bits.
    """
    if (mix_up := explain_mix_up(Path(directory), BundleKind.CKKS_WORKER)) is not None:
        raise InputError(mix_up)
    plan = CkksPlan.read(directory)
    path = Path(directory) / CIRCUIT
    try:
        serialized = read_whole(path, MAX_CIRCUIT_BYTES)
    except (OSError, ValueError) as error:
        raise unreadable(path, error, "copy the worker bundle again") from None
    digest = hashlib.sha256(serialized + json.dumps(plan.parameters, sort_keys=True).encode()).hexdigest()
    if digest != plan.plan_id:
        raise InputError(f"{path} is not the circuit of {PLAN}; copy the worker bundle again")
    try:
        circuit = PolynomialCircuit(ir.from_proto(onnx.ModelProto.FromString(serialized)))
    except HecompileError:
        raise
    except Exception as error:  # a parser may raise anything for bytes that somebody made up
        raise InputError(f"{path} is no circuit ({type(error).__name__}); copy the worker bundle again") from error
    return plan, circuit, CkksParameters.from_fields(plan.parameters)
