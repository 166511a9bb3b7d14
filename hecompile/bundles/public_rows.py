"""Read the public matrix A as the worker multiplies it: a file of byte planes, in the bundle of a plan without stored hints.

The hint of a circuit is H = W·A mod q. A client that stores none has the worker compute it with every request, by the
circuit's own integer product: the rank · ring_dim columns of A are that many tokens, and all four bytes count.

    A ∈ R_q^(in × rank)   →   planes[l, r·ring_dim + k, j] = byte l of coefficient k of A[j, r], uint8 [4, rank·ring_dim, in]
    exact(planes)          →   byte planes of H[i, r·ring_dim + k], uint8 [4, rank·ring_dim, out]

Row j of A does not depend on how many there are, so one file, as wide as the widest circuit, serves every circuit by its
first `in` columns. The worker needs no seed and no cryptographic code: these are public numbers like the weights.

Security. A is public by definition, and encryption under it uses a fresh secret each time, whoever computes H: a plan
without hints reveals nothing more. H then comes from the untrusted worker, and is verified as its replies are.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hecompile.array_files import map_npy
from hecompile.errors import InputError
from hecompile.files import unreadable

PUBLIC_ROWS = "public_rows.npy"
WORD_BYTES = 4
_EXACT = ".exact"


def exact_name(circuit: str) -> str:
    """Return the name of the circuit with the same weight that keeps all four bytes."""
    return circuit + _EXACT


def base_name(circuit: str) -> str:
    """Return the circuit whose weight file `circuit` uses: itself, or the one that it is the exact form of."""
    return circuit.removesuffix(_EXACT)


def open_public_rows(path: Path, features: int = 0) -> np.ndarray:
    """Map the planes read-only. Raises InputError when the file cannot be read, or has fewer than `features` columns."""
    try:
        planes = map_npy(path)
    except (ValueError, OSError) as error:
        raise unreadable(path, error, "copy the worker bundle again") from error
    if planes.ndim != 3 or planes.dtype != np.uint8 or planes.shape[0] != WORD_BYTES:
        raise InputError(
            f"{path} holds {planes.dtype} {list(planes.shape)[:4]}, not byte planes; copy the worker bundle again"
        )
    if planes.shape[2] < features:
        raise InputError(
            f"{path} is {planes.shape[2]} columns wide, a circuit has {features} inputs; copy the worker bundle again"
        )
    return planes
