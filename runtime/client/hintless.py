"""Take hints from the worker: for a client that stores none, each is computed by the worker, used once and forgotten.

    stored      hint file → decrypt
    hint-less   setup request → W·A mod q from the worker → decrypt → gone

A stays the bundle's shared public matrix, and every block is still encrypted under a secret of its own. So the worker sees,
and could learn, no more than in a plan with stored hints: a setup request holds nothing but the name of a circuit.

Who chooses W·A could choose which combination of a one-time secret the result shows. So the hint is verified like a reply:
nothing in it is rounded, and a wrong one passes with probability 2^-23 at most (`hecompile.he.verification.hint_is_right`).

Price of a product of T tokens, with rank · ring_dim = d·m: worker time (L·T + 4·d·m) / (L·T), download
(R·T + 4·d·m) / (R·T), for L bytes up and R down. It falls as T grows, and there is nothing to store or to compile.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hecompile.bundles.public_rows import WORD_BYTES
from hecompile.errors import WorkerError
from hecompile.he.hints import Hint
from hecompile.he.parameters import LinearParameters, RingParameters
from hecompile.runtime.transports import Answer


def hint_of(answer: Answer, ring: RingParameters, parameters: LinearParameters) -> Hint:
    """Read the hint in a worker's answer to `Transport.setup`. Raises WorkerError when it is something else."""
    return Hint.from_coefficients(ring, hint_from_planes(answer.planes, ring, parameters.out_features))


def hint_from_planes(planes: np.ndarray, ring: RingParameters, rows: int) -> Tensor:
    """Turn what the worker returned, uint8 `[4, rank · ring_dim, rows]`, into coefficients int32 `[rows, rank · ring_dim]`.

    Raises WorkerError for another shape or type.
    """
    shape = (WORD_BYTES, ring.lattice_dim, rows)
    if planes.dtype != np.uint8 or planes.shape != shape:
        raise WorkerError(f"expected a hint of uint8 {list(shape)}, got {planes.dtype} {list(planes.shape)}")
    words = np.ascontiguousarray(planes.transpose(2, 1, 0))  # uint8 [rows, rank · d, 4]
    return torch.from_numpy(words.view(np.int32)[..., 0])
