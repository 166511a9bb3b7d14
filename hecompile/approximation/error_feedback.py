"""Round a matrix to integers so that its products with the vectors that it will meet change least.

    minimise ‖X·(W - Q)ᵀ‖² over integer Q:  column by column, the error of each is taken up by the columns to its right

GPTQ (Frantar et al., arXiv 2210.17323), which is Babai's nearest plane algorithm for the lattice of H^½ (Chen et al., arXiv
2507.18553), H = XᵀX + λ·1. With Hˉ¹ = UᵀU, U upper triangular, the error e of column j moves column k > j by -e·U_jk / U_jj.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

_DAMPING = 0.1
"""λ as a share of the mean of H's diagonal: directions that the samples do not have still count a little."""
_BLOCK = 128
"""Columns whose errors are taken up by the rest of the matrix in one product."""
_LARGEST_FACTOR = 4096
"""Columns that one factor covers; wider matrices are cut, for a factor takes time that grows with the cube."""


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
    """Return U, f32 [n, n], of samples [T, n]."""
    largest = samples.abs().max()
    scaled = samples / largest if largest > 0 else samples  # H is then in range, whatever the samples' size
    moments = (scaled.t() @ scaled).double()  # [n, n]
    mean = moments.diagonal().mean()
    moments.diagonal().add_(_DAMPING * mean if mean > 0 else torch.ones_like(mean))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    return torch.linalg.cholesky(inverse, upper=True).float()


def _round_columns(steps: Tensor, factor: Tensor, largest: int) -> Tensor:
    rest = steps.t().contiguous()  # [n, out]: a column of the matrix is a row here
    rounded = torch.empty_like(rest)
    for start in range(0, len(rest), _BLOCK):
        block = slice(start, min(start + _BLOCK, len(rest)))
        own, errors = factor[block, block], torch.empty_like(rest[block])
        for row, column in enumerate(range(block.start, block.stop)):
            rounded[column] = rest[column].round().clamp_(-largest, largest)
            errors[row] = (rest[column] - rounded[column]) / own[row, row]
            rest[column + 1 : block.stop].addr_(own[row, row + 1 :], errors[row], alpha=-1)
        rest[block.stop :].addmm_(factor[block, block.stop :].t(), errors, alpha=-1)
    return rounded.t()
