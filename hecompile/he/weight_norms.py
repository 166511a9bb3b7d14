"""Measure the norms of the rows of an integer matrix, on which bounds, precision and noise of its circuit depend."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hecompile.errors import InputError

_NORM_CHUNK = 2**18
"""Elements that are measured at a time: two megabytes as float64, few enough for the cache and enough for both cores."""


@dataclass(frozen=True)
class WeightNorms:
    """Hold all that bounds and precision depend on of an integer matrix `[out_features, in_features]`.

    Attributes:
        max_l1: largest ‖W_i‖₁ of a row.
        max_l2: largest ‖W_i‖₂ of a row.
        mean_square_l2: mean of ‖W_i‖₂² over the rows.
    """

    in_features: int
    out_features: int
    max_l1: int
    max_l2: float
    mean_square_l2: float


def measure_norms(weight: Tensor) -> tuple[WeightNorms, WeightNorms]:
    """Measure the rows of int8 or int16 `weight [out, in]`, and its columns (the rows of its transpose), in one pass.

    The result is exact: float64 holds every sum of up to 2^23 squares of int16.

    Raises:
        InputError: the weight has another type or rank, or is empty.
    """
    if weight.dtype not in (torch.int8, torch.int16) or weight.dim() != 2 or 0 in weight.shape:
        raise InputError(f"a weight is int8 or int16 [out, in], got {weight.dtype} {list(weight.shape)}")
    if weight.stride(0) < weight.stride(1):  # a transposed view: read it in the order it lies in memory
        columns, rows = measure_norms(weight.t())
        return rows, columns
    outputs, inputs = weight.shape
    row_sums = torch.empty((2, outputs), dtype=torch.float64)  # of magnitudes, of squares
    column_sums = torch.zeros((2, inputs), dtype=torch.float64)
    step = max(1, _NORM_CHUNK // inputs)
    for start in range(0, outputs, step):
        rows_here = slice(start, start + step)
        values = weight[rows_here].to(torch.float64).abs_()  # [step, in]
        for sums_of_rows, sums_of_columns in zip(row_sums, column_sums, strict=True):
            torch.sum(values, dim=1, out=sums_of_rows[rows_here])
            sums_of_columns += values.sum(dim=0)
            values.mul_(values)
    return _norms(inputs, row_sums), _norms(outputs, column_sums)


def _norms(in_features: int, sums: Tensor) -> WeightNorms:
    """Summarise float64 `[2, out]`: ‖W_i‖₁ and ‖W_i‖₂² of each row."""
    magnitudes, squares = sums
    return WeightNorms(
        in_features=in_features,
        out_features=sums.shape[1],
        max_l1=int(magnitudes.max()),
        max_l2=math.sqrt(float(squares.max())),
        mean_square_l2=float(squares.mean()),
    )
