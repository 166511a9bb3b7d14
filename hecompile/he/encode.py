"""Encode real activations and gradients as integers: one scale per token, so that each token uses the whole range."""

from __future__ import annotations

import torch
from torch import Tensor

from hecompile.errors import InputError, NotFiniteError
from hecompile.he.kernels.norms import SMALLEST_SCALE


def encode(x: Tensor, bound: int, norm_bound: float = 0.0) -> tuple[Tensor, Tensor]:
    """Scale each token to the largest integers that the bounds admit.

    They are within [-bound, bound], or of Euclidean norm up to `norm_bound` (plus √n/2 of rounding), whichever admits more.

    Args:
        x: float `[T, n]` of any precision.
        bound: 1 ≤ bound < 2^31; `LinearParameters.input_bound`.
        norm_bound: < 2^31; `LinearParameters.norm_bound`.

    Returns:
        int32 `[T, n]` and the scale, float64 `[T, 1]`, with x = integer · scale ± scale/2. A token that is all zeros
        (a gradient that underflowed) has scale 0 and integers 0. So has a token below 1e-307 · bound.

    Raises:
        InputError: x is not a float matrix.
        NotFiniteError: x has an infinity or NaN.
    """
    if x.dim() != 2 or not x.is_floating_point() or x.shape[1] == 0:
        raise InputError(f"encode wants a float matrix [tokens, features], got {x.dtype} {list(x.shape)}")
    if not 1 <= bound < 2**31:
        raise InputError(f"the integer bound must be in [1, 2^31), got {bound}")
    largest = x.detach().abs().amax(dim=1, keepdim=True).double()  # [T, 1]; a NaN wins
    if not torch.isfinite(largest).all():
        raise NotFiniteError("a value to encrypt is infinite or NaN: training has diverged or the model has overflowed")
    exact = x.detach().double()
    scale = largest / bound
    if norm_bound > 0:
        length = torch.linalg.vector_norm(exact, dim=1, keepdim=True)  # [T, 1]
        scale = torch.minimum(scale, length / norm_bound)
    negligible = scale < SMALLEST_SCALE  # below, scale would have lost precision and its inverse could be infinite
    scale = scale.masked_fill(negligible, 0.0)
    inverse = (1 / scale).masked_fill(negligible, 0.0)
    # A largest value of bound · (1 + 2^-51) at most rounds to bound; the norm bound has slack of its own.
    return torch.mul(exact, inverse).round_().to(torch.int32), scale


def decode(y: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Turn integers back into reals: y · scale.

    Args:
        y: integer `[T, n]`.
        scale: float `[T, 1]`; where it is 0 the result is exactly +0, whatever noise y holds.
        dtype: of the result.

    Raises:
        InputError: the scale does not fit y.
    """
    if scale.shape != (y.shape[0], 1):
        raise InputError(f"decode wants a scale [{y.shape[0]}, 1] for {list(y.shape)}, got {list(scale.shape)}")
    return torch.mul(y.double(), scale).add_(0.0).to(dtype)  # -0 + 0 = +0
