"""Hold what calibration records of the rows that go into and out of a Linear, forward and backward."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from torch import Tensor

MOMENTS = "hecompile.moments"
"""Key in the `meta` of a Linear's result: `Moments`."""


class RowRange:
    """Gather the largest magnitude and the crest factor of rows that come in parts.

    The crest is the root mean square, over rows, of max|x| / rms(x) within a row. Rows of zeros do not count.
    """

    def __init__(self) -> None:
        self._peak = 0.0
        self._crests: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        """Take float32 [..., features]."""
        rows = rows.reshape(-1, rows.shape[-1])  # [T, features]
        peak = rows.abs().amax(dim=1)  # [T]
        live = peak > 0
        if bool(live.any()):
            self._peak = max(self._peak, float(peak.max()))
            self._crests.append(peak[live] / rows[live].pow(2).mean(dim=1).sqrt())  # [live rows]

    def text(self) -> str:
        """Return JSON {"max", "crest"} to four digits."""
        if not self._crests:
            return json.dumps({"max": 0.0, "crest": 1.0})
        crest = torch.cat(self._crests).pow(2).mean().sqrt()
        return json.dumps({"max": float(f"{self._peak:.4g}"), "crest": float(f"{crest:.4g}")})


class ProductPeak:
    """Gather how large products become in proportion to the length of what is multiplied; both may come in parts."""

    def __init__(self) -> None:
        self._peak = 0.0

    def add(self, products: Tensor, lengths: Tensor) -> None:
        """Take products [..., n] and float64 lengths [T]; rows where one of them is zero do not count."""
        largest = products.reshape(-1, products.shape[-1]).abs().amax(dim=1).double()  # [T]
        live = (lengths > 0) & (largest > 0)
        if bool(live.any()):
            self._peak = max(self._peak, float((largest[live] / lengths[live]).max()))

    def text(self) -> str | None:
        """Return the largest ratio to four digits, None where there was nothing but zeros."""
        return f"{self._peak:.4g}" if self._peak > 0 else None


class SummedProducts:
    """Gather the peak of products that add up: those of the gradients of linears that read one value, sent in one row.

    readers: how many linears there are. rows: how many rows each multiplies, in order, but perhaps in parts. The sums are
    let go of when all linears have given theirs.
    """

    def __init__(self, readers: int, rows: int) -> None:
        self._missing, self._rows, self._peak = readers * rows, rows, ProductPeak()
        self._taken: dict[str, int] = {}
        self._sums: tuple[Tensor, Tensor] | None = None

    def add(self, reader: str, products: Tensor, sent: Tensor) -> None:
        """Take products [..., in] of a linear, and what it multiplies them from, [..., out], in units of its rows."""
        products, square = products.reshape(-1, products.shape[-1]), lengths(sent).square()
        if self._sums is None:
            self._sums = torch.zeros(self._rows, products.shape[1]), square.new_zeros(self._rows)
        start = self._taken.get(reader, 0)
        end = self._taken[reader] = start + len(products)
        self._missing -= len(products)
        for total, part in zip(self._sums, (products, square), strict=True):
            total[start:end] += part
        if self._missing == 0:
            self._finish()

    def add_alone(self, products: Tensor, sent: Tensor) -> None:
        """Take products that are in no sum."""
        self._peak.add(products, lengths(sent))

    def text(self) -> str | None:
        """Return what `ProductPeak.text` does, of the linears that gave anything."""
        self._finish()
        return self._peak.text()

    def _finish(self) -> None:
        if self._sums is not None:
            products, square = self._sums
            self._peak.add(products, square.sqrt())
            self._sums = None


@dataclass(frozen=True)
class Moments:
    """Hold sums of squares, over rows, of what passes through a Linear y = x·Wᵀ; all float64, for gradients can be tiny.

    Attributes:
        inputs: of x, [in].
        outputs: of y, of all columns together.
        gradients: of the gradient g of y, [out]; None where none reached it.
        products: of g·W, [in]; None likewise.
    """

    inputs: Tensor
    outputs: float
    gradients: Tensor | None = None
    products: Tensor | None = None


def squares(rows: Tensor) -> Tensor:
    """Sum the squares of the rows of [..., features]: float64 [features]."""
    return rows.reshape(-1, rows.shape[-1]).double().square().sum(dim=0)


def lengths(rows: Tensor) -> Tensor:
    """Return the Euclidean norm of every row of [..., features], float64 [T]."""
    return torch.linalg.vector_norm(rows.reshape(-1, rows.shape[-1]), dim=1, dtype=torch.float64)


def largest_of_rows(matrix: Tensor) -> Tensor:
    """Return the largest magnitude of every row of a matrix [rows, columns], without a second one."""
    least, most = torch.aminmax(matrix, dim=1)
    return torch.maximum(-least, most)
