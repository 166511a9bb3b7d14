"""Compute a circuit of the worker in plain integers: the meaning of `EncryptedLinear` (passes/offload/lower_worker.py)."""

from __future__ import annotations

import numpy as np

from hecompile.word_sizes import bytes_of


def encrypted_linear_reference(planes: np.ndarray, weight: np.ndarray, reply_bits: int) -> np.ndarray:
    """Compute `EncryptedLinear` in int64: slow and plain, for the known answer and for tests.

    Y = W·word mod 2^(8L), rounded to nearest by adding 2^(8L-C-1), then its top C bits in as few bytes as hold them, lowest
    first; the bits below are 0. |Y| stays below 2^32 · 2^15 · in, so int64 holds it for every in < 2^16.

    Args:
        planes: uint8 [upload_limbs, T, in]; L = upload_limbs.
        weight: int8 or int16 [in, out].
        reply_bits: C.

    Returns:
        uint8 [R, T, out], R the bytes of C bits.
    """
    limbs = planes.shape[0]
    scales = np.int64(256) ** np.arange(limbs, dtype=np.int64)
    word = np.tensordot(scales, planes.astype(np.int64), axes=1)  # [T, in]
    dropped_bits, dropped_bytes = 8 * limbs - reply_bits, limbs - bytes_of(reply_bits)
    half = 1 << (dropped_bits - 1) if dropped_bits else 0
    product = (word @ weight.astype(np.int64) + np.int64(half)) & -(1 << dropped_bits)  # [T, out]
    kept = [(product >> (8 * place)) & 255 for place in range(dropped_bytes, limbs)]
    return np.stack(kept).astype(np.uint8)  # [R, T, out]
