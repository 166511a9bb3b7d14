"""Round a matrix to integers so that its products with the vectors that it will meet change least.

    minimise ‖X·(W - Q)ᵀ‖² over integer Q:  column by column, the error of each is taken up by the columns to its right

GPTQ (Frantar et al., arXiv 2210.17323), which is Babai's nearest plane algorithm for the lattice of H^½ (Chen et al., arXiv
2507.18553), H = XᵀX + λ·1. With H = V·Vᵀ, V upper triangular, the squares to be minimised are those of Vᵀ·e, whose entry k
has no error of a later column: the error e = W - Q of column j moves column k > j by e·V_jk / V_kk. So one factorisation is
enough.
"""

# mypy: disallow-untyped-decorators = False
from __future__ import annotations

from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

_DAMPING = 0.1
"""λ as a share of the mean of H's diagonal: directions that the samples do not have still count a little."""
_BLOCK = 128
"""Columns whose errors are taken up by the rest of the matrix in one product."""
_LARGEST_FACTOR = 4096
"""Columns that one factor covers; wider matrices are cut, for a factor takes time that grows with the cube."""
_TILE = 64
"""Rows of the matrix that are rounded together: a block of columns of so many fits into the nearest cache."""



class ErrorFeedback:
    """Hold what the rounding of every matrix that reads `samples` shares.

    samples: float32 [T, in]. Only finite ones are of use; a column that is zero in all of them is rounded to nearest.
    """

    def __init__(self, samples: Tensor) -> None:
        width = samples.shape[1]
        parts = -(-width // _LARGEST_FACTOR)
        bounds = [width * part // parts for part in range(parts + 1)]
        self._columns = [slice(*pair) for pair in pairwise(bounds)]
        self._factors = [_factor(samples[:, columns]) for columns in self._columns]

    def round(self, steps: Tensor, largest: int) -> Tensor:
        """Round float32 `steps [out, in]`, a matrix in units of its rows' scales, to whole numbers in [-largest, largest].

        Deterministic: equal inputs give equal results on one machine.
        """
        parts = [
            _round_columns(steps[:, columns], factor, largest)
            for columns, factor in zip(self._columns, self._factors, strict=True)
        ]
        return torch.cat(parts, dim=1)


def _factor(samples: Tensor) -> Tensor:
    """Return V_jk / V_kk, f32 [n, n], of samples [T, n]; only j < k is of use."""
    largest = samples.abs().max()
    scaled = samples / largest if largest > 0 else samples  # H is then in range, whatever the samples' size
    moments = (scaled.t() @ scaled).double()  # [n, n]
    mean = moments.diagonal().mean()
    moments.diagonal().add_(_DAMPING * mean if mean > 0 else torch.ones_like(mean))
    factor = torch.linalg.cholesky(moments.flip(0, 1)).flip(0, 1)  # lower triangular from the last column: V
    return (factor / factor.diagonal()).float()


def _round_columns(steps: Tensor, factor: Tensor, largest: int) -> Tensor:
    given = steps.t().contiguous()  # [n, out]: a column of the matrix is a row here
    rest, rounded = given.clone(), torch.empty_like(given)
    for start in range(0, len(rest), _BLOCK):
        block = slice(start, min(start + _BLOCK, len(rest)))
        own = factor[block, block].contiguous()
        _round_block(rest[block].numpy(), given[block].numpy(), own.numpy(), float(largest), rounded[block].numpy())
        rest[block.stop :].addmm_(factor[block, block.stop :].t(), given[block] - rounded[block])
    return rounded.t()


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _round_block(rest: Any, given: Any, factor: Any, largest: float, rounded: Any) -> None:
    """Round columns [n, out] one after the other, each where the errors of those before it have moved it."""
    columns, rows = rest.shape
    bound = np.float32(largest)
    local, error = np.empty((columns, _TILE), np.float32), np.empty(_TILE, np.float32)
    for start in range(0, rows, _TILE):
        width = min(_TILE, rows - start)
        for j in range(columns):
            local[j, :width] = rest[j, start : start + width]
        for j in range(columns):
            for i in range(width):
                whole = min(max(np.rint(local[j, i]), -bound), bound)
                rounded[j, start + i] = whole
                error[i] = given[j, start + i] - whole
            for k in range(j + 1, columns):
                share = factor[j, k]
                for i in range(width):
                    local[k, i] += share * error[i]
