"""The public matrix A as the worker multiplies it: a file of byte planes in the bundle of a plan without stored hints.

The hint of a circuit is H = W·A mod q. A client that stores none has the worker compute it with every request, by the
circuit's own integer product: the rank · ring_dim columns of A are so many tokens, of which all four bytes count.

    A ∈ R_q^(in × rank)   →   planes[l, r·ring_dim + k, j] = byte l of coefficient k of A[j, r], uint8 [4, rank·ring_dim, in]
    exact(planes)          →   byte planes of H[i, r·ring_dim + k], uint8 [4, rank·ring_dim, out]

Row j of A does not depend on how many there are, so one file, as wide as the widest circuit, serves every circuit by its
first `in` columns. The worker needs no seed and no cryptographic code: these are public numbers like the weights.

Security. A is public by definition, and encryption under it uses a fresh secret each time, whoever computes H: nothing more
can be learned from a plan without hints. H then comes from the untrusted worker, and is verified as its replies are.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from hecompile.errors import InputError, LegalityError, WorkerError
from hecompile.he.parameters import RingParameters
from hecompile.he.public_matrix import PublicMatrix

PUBLIC_ROWS = "public_rows.npy"
WORD_BYTES = 4
_EXACT = ".exact"
_CHUNK = 256
"""Rows of A expanded at a time: 1.5 MiB of words at lattice dimension 1536."""


def exact_name(circuit: str) -> str:
    """The name of the circuit with the same weight that keeps all four bytes."""
    return circuit + _EXACT


def base_name(circuit: str) -> str:
    """The circuit whose weight file `circuit` uses: its own, or that of the one it is the exact form of."""
    return circuit.removesuffix(_EXACT)


def share_weight(exact: ir.Model, base: Path) -> None:
    """Makes the lowered circuit `exact` refer to the weight file of the circuit in `base`, of which it is the exact form."""
    own, stored = _weight_digits(exact), _weight_digits(ir.load(base))
    for value, other in zip(own, stored, strict=True):
        assert value.const_value is not None and other.const_value is not None
        if value.const_value.shape != other.const_value.shape or value.dtype != other.dtype:
            raise LegalityError(f"circuit {exact.graph.name}: its weight is not that of {base.name}")
        value.const_value = other.const_value


def _weight_digits(model: ir.Model) -> list[ir.Value]:
    """The int8 constants of a lowered circuit, lowest digit first."""
    digits = [node.inputs[1] for node in model.graph if node.op_type == "MatMulInteger"]
    return list(dict.fromkeys(digit for digit in digits if digit is not None))


def write_public_rows(path: Path, public: PublicMatrix, features: int) -> None:
    """Writes uint8 `[4, rank · ring_dim, features]` of the first `features` rows of A. Raises OSError as files do."""
    if features > public.rows:
        raise InputError(f"the public matrix has {public.rows} rows, {features} are wanted")
    shape = (WORD_BYTES, public.params.lattice_dim, features)
    planes = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    for start in range(0, features, _CHUNK):
        rows = slice(start, min(start + _CHUNK, features))
        words = public.coefficients(rows).reshape(rows.stop - start, -1).numpy()  # int32 [rows, rank · d], little-endian
        octets = words.view(np.uint8).reshape(*words.shape, WORD_BYTES)
        planes[:, :, rows] = octets.transpose(2, 1, 0)  # [4, rank · d, rows]
    planes.flush()


def open_public_rows(path: Path) -> np.ndarray:
    """The planes, memory-mapped read-only. Raises InputError when the file cannot be read."""
    try:
        planes: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}); copy the worker bundle again") from error
    if planes.ndim != 3 or planes.dtype != np.uint8 or planes.shape[0] != WORD_BYTES:
        raise InputError(f"{path} holds {planes.dtype} {list(planes.shape)}, not byte planes; copy the worker bundle again")
    return planes


def hint_from_planes(planes: np.ndarray, ring: RingParameters, rows: int) -> Tensor:
    """What the worker returned, uint8 `[4, rank · ring_dim, rows]`, as `setup` makes it: int32 `[rows, rank · ring_dim]`.

    Raises WorkerError when the shape is another.
    """
    shape = (WORD_BYTES, ring.lattice_dim, rows)
    if planes.dtype != np.uint8 or planes.shape != shape:
        raise WorkerError(f"a hint of uint8 {list(shape)} was asked for, got {planes.dtype} {list(planes.shape)}")
    octets = np.ascontiguousarray(planes.transpose(2, 1, 0))  # [rows, rank · d, 4]
    return torch.from_numpy(octets.view(np.int32)[..., 0])
