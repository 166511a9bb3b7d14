"""Map the weights of a bundle from their files, one copy for both directions."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from hecompile.bundles.worker import CircuitSpec, WorkerBundle

COMPARED_ROWS = 256
"""Rows compared at a time, so that little of a second copy is in memory at once."""


@dataclass(frozen=True)
class Weight:
    """Hold the right-hand side of a circuit.

    Attributes:
        digits: int8, lowest first, in C order and read-only; each [in_features, out_features], or [out_features,
            in_features] if `transposed`.
        owner: the circuit whose file they are from, itself or the other direction of its linear.
    """

    digits: tuple[np.ndarray, ...]
    transposed: bool
    owner: str


class Weights:
    """Read weights when a circuit first needs them, and keep them; may be called from several threads.

    Where the bundle has both directions of a linear and their files agree, the one that is used later is the first one
    transposed, so that only one stays in memory. A large weight is not copied: it is the mapped file, whose pages the
    operating system reads when they are touched, shares between processes and may drop. The files must therefore stay as
    they are while they are served.
    """

    def __init__(self, bundle: WorkerBundle) -> None:
        self._bundle = bundle
        self._weights: dict[str, Weight] = {}
        self._lock = threading.Lock()

    def __getitem__(self, spec: CircuitSpec) -> Weight:
        with self._lock:
            if spec.name not in self._weights:
                self._weights[spec.name] = self._load(spec)
            return self._weights[spec.name]

    def _load(self, spec: CircuitSpec) -> Weight:
        digits = self._bundle.weight_digits(spec.name)[: spec.upload_limbs]  # a higher digit is 0 mod 2^(8·limbs)
        other = self._weights.get(f"{spec.linear}.{'backward' if spec.direction == 'forward' else 'forward'}")
        # Compared and not assumed: the manifest says which circuits are a pair, the files say whether they are.
        if other is not None and not other.transposed and len(other.digits) >= len(digits):
            kept = other.digits[: len(digits)]
            if all(_is_transpose(a, b) for a, b in zip(kept, digits, strict=True)):
                return Weight(kept, True, other.owner)
        return Weight(tuple(_read_only(digit) for digit in digits), False, spec.name)


def _is_transpose(a: np.ndarray, b: np.ndarray) -> bool:
    if a.shape != b.shape[::-1]:
        return False
    starts = range(0, b.shape[0], COMPARED_ROWS)
    return all(np.array_equal(a[:, i : i + COMPARED_ROWS].T, b[i : i + COMPARED_ROWS]) for i in starts)


def _read_only(digit: np.ndarray) -> np.ndarray:
    view = np.ascontiguousarray(digit).view()
    view.flags.writeable = False
    return view
