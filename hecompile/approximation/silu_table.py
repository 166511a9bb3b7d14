"""Make a SiLU of few bits: a table from integers to integers, which a look-up under TFHE computes bit for bit.

With b bits, an input step s_in and an output step s_out,

    index = clamp(round((x - lower) / s_in), 0, 2^b - 1)         integer = table[index]         y = (integer - zero) · s_out

The indices cover [lower, upper]; `lower` is no deeper than where SiLU is within half an output step of zero for good, so
that clamping below it costs nothing. Error for x ≤ upper: s_in/2 of the input times the largest slope of SiLU, and s_out/2
of rounding the entry; below `lower` at most s_out. (Uniform affine quantisation as in Jacob et al., arXiv 1712.05877,
section 2.1; the table takes the place of their arithmetic.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hecompile.approximation.silu import silu
from hecompile.errors import InputError

TABLE_BITS = (4, 5, 6, 7, 8)
"""Bits that a table may have: each bit more makes a look-up under TFHE two to three times as expensive."""

LARGEST_SLOPE = 1.0998396
"""The largest slope of SiLU, sigmoid(x)·(1 + x·(1 - sigmoid(x))), at x = 2.3994."""

SMALLEST, AT_SMALLEST = -0.27846454, -1.27846454
"""The least value of SiLU, and where it is: below, SiLU rises to zero."""


@dataclass(frozen=True)
class ActivationTable:
    """Hold the table and the steps of its input and output.

    Attributes:
        lower: the input of the first entry.
        entries: 2^bits integers from 0 to 2^bits - 1.
        zero: the integer that stands for 0.

    Raises InputError for a table that is not of that form.
    """

    bits: int
    lower: float
    input_scale: float
    output_scale: float
    zero: int
    entries: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.bits not in TABLE_BITS:
            raise InputError(f"a table can have {', '.join(map(str, TABLE_BITS))} bits, got {self.bits}")
        size = 1 << self.bits
        if len(self.entries) != size or not all(0 <= entry < size for entry in (*self.entries, self.zero)):
            raise InputError(f"a table of {self.bits} bits has {size} entries from 0 to {size - 1}")
        if not (math.isfinite(self.lower) and 0 < self.input_scale < math.inf and 0 < self.output_scale < math.inf):
            raise InputError("the steps of a table must be positive numbers, and its lower end finite")

    @property
    def upper(self) -> float:
        """Return the input of the last entry."""
        return self.lower + self.input_scale * (len(self.entries) - 1)

    @property
    def error_bound(self) -> float:
        """Bound |y - SiLU(x)| for x between `lower` and `upper`, and for any smaller x where `is_flat_below`."""
        return max(LARGEST_SLOPE * self.input_scale / 2 + self.output_scale / 2, self.output_scale)

    @property
    def is_flat_below(self) -> bool:
        """Tell whether clamping inputs below `lower` stays within the error bound."""
        return self.lower <= AT_SMALLEST and -_silu(self.lower) <= self.output_scale / 2 * (1 + 1e-6)

    def lookup(self, indices: np.ndarray) -> np.ndarray:
        """Look up int64 indices of any shape, from 0 to 2^bits - 1, in cleartext; returns int64 of that shape."""
        return np.asarray(self.entries, dtype=np.int64)[indices]

    def attributes(self) -> dict[str, Any]:
        """Return the attributes of a QuantizedSiLU node with this table."""
        return {
            "bits": self.bits,
            "lower": self.lower,
            "input_scale": self.input_scale,
            "output_scale": self.output_scale,
            "zero": self.zero,
            "entries": list(self.entries),
        }

    @classmethod
    def of(cls, attributes: Mapping[str, Any]) -> ActivationTable:
        """Read the table of a QuantizedSiLU node."""
        given = {name: attributes[name] for name in ("bits", "lower", "input_scale", "output_scale", "zero")}
        return cls(**given, entries=tuple(int(entry) for entry in attributes["entries"]))


def silu_table(bits: int, lowest: float, upper: float) -> ActivationTable:
    """Make the table of SiLU from `lowest` (at most 0) to `upper` (above 0); ends and steps are exact in float32.

    Raises InputError for another number of bits than one of `TABLE_BITS`.
    """
    if bits not in TABLE_BITS:
        raise InputError(f"a table can have {', '.join(map(str, TABLE_BITS))} bits, got {bits}")
    largest = (1 << bits) - 1
    greatest = _silu(upper)
    least = _silu(lowest) if lowest > AT_SMALLEST else SMALLEST
    # One step is left over, so that zero may fall on an integer.
    output_scale = float(np.float32((greatest - least) / (largest - 1)))
    zero = math.ceil(-least / output_scale - 0.5)
    lower = float(np.float32(max(lowest, _flat_from(output_scale / 2))))
    input_scale = float(np.float32((upper - lower) / largest))
    inputs = lower + input_scale * np.arange(largest + 1)
    entries = np.clip(np.rint(silu(inputs) / output_scale) + zero, 0, largest).astype(int)
    return ActivationTable(bits, lower, input_scale, output_scale, zero, tuple(entries.tolist()))


def _silu(x: float) -> float:
    return float(silu(np.asarray(x)))


def _flat_from(distance: float) -> float:
    """Find, by bisection, the x below the minimum of SiLU from which on down it is within `distance` of zero."""
    if distance >= -SMALLEST:
        return AT_SMALLEST
    deep, shallow = AT_SMALLEST - 64.0, AT_SMALLEST
    for _ in range(64):
        middle = (deep + shallow) / 2
        if -_silu(middle) <= distance:
            deep = middle
        else:
            shallow = middle
    return deep
