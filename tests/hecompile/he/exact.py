"""The scheme's arithmetic done slowly with exact integers, to compare against."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hecompile.he.kernels.ring_shape import trinomial
from hecompile.he.public_matrix import PublicMatrix


def product(a: NDArray[np.int64], s: NDArray[np.int64], of_trinomial: bool = False) -> NDArray[np.int64]:
    """a · s mod Y^d + 1 or mod Y^d - Y^(d/2) + 1, not reduced mod q: exact in int64 for 32-bit × ternary up to d = 2^29."""
    d = len(a)
    full = np.append(np.convolve(a, s), 0)  # [2d]
    for degree in reversed(range(d, 2 * d)):  # Y^degree is -Y^(degree - d), or that and Y^(degree - d/2)
        full[degree - d] -= full[degree]
        if of_trinomial:
            full[degree - d // 2] += full[degree]
    return full[:d]


def inner_products(rows: Tensor, secret: NDArray[np.int8], of_trinomial: bool = False) -> NDArray[np.int64]:
    """⟨A_j, s⟩ for int32 rows `[n, rank, d]` and int8 `[rank, d]`: int64 `[n, d]`."""
    wide, small = rows.numpy().astype(np.int64), secret.astype(np.int64)
    return np.stack([sum(product(a, s, of_trinomial) for a, s in zip(row, small, strict=True)) for row in wide])


def words(planes: Tensor) -> NDArray[np.int64]:
    """Byte planes `[limbs, ...]` as the numbers they spell: int64 `[...]`."""
    return sum(plane.numpy().astype(np.int64) << (8 * limb) for limb, plane in enumerate(planes))


def encryption(public: PublicMatrix, secret: NDArray[np.int8], error: NDArray[np.int8], x: Tensor) -> NDArray[np.int64]:
    """b mod 2^32 for one block: int64 `[T, in]`."""
    rows = public.coefficients(slice(0, x.shape[1]))
    mask = inner_products(rows, secret, trinomial(public.params))[:, : len(x)].T  # [T, in]
    return (mask + error + x.numpy()) % 2**32


def centred(values: NDArray[np.int64]) -> Tensor:
    """Residues mod 2^32 in [-2^31, 2^31)."""
    return torch.from_numpy((values + 2**31) % 2**32 - 2**31)
