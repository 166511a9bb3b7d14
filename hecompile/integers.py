"""Split wide integer weights into bytes, so that they run on products of 8-bit integers."""

from __future__ import annotations

import platform
from functools import cache

import llvmlite.binding
import numpy as np

WEIGHT_DTYPES = (np.dtype(np.int8), np.dtype(np.int16))
"""Types of a weight: one byte, or two."""

MAX_INT16_WEIGHT = 127 * 256 + 127
"""Largest weight that two balanced bytes hold: 127 · 256 + 127 (int16 itself goes 128 further)."""


@cache
def int8_products_are_fast() -> bool:
    """Return whether `torch._int_mm` has a kernel for this processor: on x86 that wants VNNI.

    Without one the products are right, and take some seventy times as long as in float32, measured with AVX2 alone.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    features = llvmlite.binding.get_host_cpu_features()
    return bool(features.get("avx512vnni", False) or features.get("avxvnni", False))


def balanced_bytes(weight: np.ndarray) -> tuple[np.ndarray, ...]:
    """Split an int8 or int16 array into int8 digits in [-128, 127], lowest first: weight = Σ_k digit_k · 256^k.

    An int8 array is its own only digit.

    Raises:
        ValueError: another type, or an int16 value above 32639.
    """
    if weight.dtype == np.int8:
        return (weight,)
    if weight.dtype != np.int16 or (weight.size and int(weight.max()) > MAX_INT16_WEIGHT):
        raise ValueError(f"weights are int8, or int16 up to {MAX_INT16_WEIGHT}; got {weight.dtype}")
    low = weight.astype(np.int8)  # the value mod 256, centred
    high = ((weight.astype(np.int32) - low) >> 8).astype(np.int8)
    return low, high


def from_balanced_bytes(digits: tuple[np.ndarray, ...]) -> np.ndarray:
    """Invert `balanced_bytes`."""
    if len(digits) == 1:
        return digits[0]
    low, high = digits
    return (high.astype(np.int16) * 256 + low).astype(np.int16)
