"""Compute a circuit of the worker in plain integers: the meaning of `EncryptedLinear` (passes/offload/lower_worker.py)."""

from __future__ import annotations

import numpy as np


def encrypted_linear_reference(planes: np.ndarray, weight: np.ndarray, reply_bytes: int) -> np.ndarray:
    """Compute `EncryptedLinear` in int64: slow and plain, for the known answer and for tests.

    Y = W·word mod 2^(8L), rounded to nearest by adding 2^(8(L-R)-1), then its top R bytes, lowest first. |Y| stays below
    2^32 · 2^15 · in, so int64 holds it for every in < 2^16.

    Args:
        planes: uint8 [upload_limbs, T, in]; L = upload_limbs.
        weight: int8 or int16 [in, out].
        reply_bytes: R.

    Returns:
        uint8 [reply_bytes, T, out].
    """
    limbs = planes.shape[0]
    scales = np.int64(256) ** np.arange(limbs, dtype=np.int64)
    word = np.tensordot(scales, planes.astype(np.int64), axes=1)  # [T, in]
    dropped_bits = 8 * (limbs - reply_bytes)
    half = 1 << (dropped_bits - 1) if dropped_bits else 0
    product = word @ weight.astype(np.int64) + np.int64(half)  # [T, out]
    kept = [(product >> (dropped_bits + 8 * r)) & 255 for r in range(reply_bytes)]
    return np.stack(kept).astype(np.uint8)  # [reply_bytes, T, out]
