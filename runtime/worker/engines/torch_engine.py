"""Evaluate circuits by `torch._int_mm` (int8 × int8 → int32) on the CPU.

This is the engine for machines without AVX512-VNNI that have another fast product of int8. With AVX2 alone it is exact but
of no use: seventy times slower than float32.

Bytes are unsigned and `_int_mm` is signed, so the word is rewritten in balanced digits, d_l in [-128, 127] with
Σ d_l · 2^(8l) ≡ word mod 2^(8L). On words that is `(b + 0x80808080) ^ 0x80808080` read as int8; on byte planes it is
the same carry chain, one plane after the other, without gathering bytes into words (5 times faster, measured).
|product| ≤ 128 · 128 · in stays below 2^31 for in < 131072. Later arithmetic is int32, which torch wraps mod 2^32.

`split_digits` and `recombine` are plain torch and run on any device: the CUDA engine's fused kernels are tested
against them. oneDNN takes the weight in either orientation at the same speed, hence one mapped copy for both directions.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hecompile.bundles.worker import WorkerBundle
from hecompile.runtime.worker.engines.base import check_request
from hecompile.runtime.worker.engines.weights import Weights
from hecompile.word_sizes import bytes_of


class TorchEngine:
    """Evaluate the circuits of one bundle in torch.

    Memory beside the mapped weights: the request, 4 · limbs · T · out_features bytes of products, and copies of those.
    """

    name = "torch"

    def __init__(self, bundle: WorkerBundle) -> None:
        self._bundle = bundle
        self._weights = Weights(bundle)

    def evaluate(self, circuit: str, planes: np.ndarray) -> np.ndarray:
        """See `Engine.evaluate`."""
        spec = check_request(self._bundle, circuit, planes)
        weight = self._weights[spec]
        limbs, tokens, features = planes.shape
        digits = split_digits(readable(planes), limbs * tokens, features)
        products = []
        for j, stored in enumerate(weight.digits):
            matrix = readable(stored)
            # a term with j + k ≥ limbs is 0 mod 2^(8·limbs), hence fewer rows for the higher digit
            products.append(torch._int_mm(digits[: (limbs - j) * tokens], matrix.t() if weight.transposed else matrix))
        return recombine(products, limbs, tokens, spec.out_features, spec.reply_bits).numpy()


def readable(array: np.ndarray) -> Tensor:
    """Return a tensor over the memory of `array`. Torch has no read-only tensors; the engines write into none of these."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def split_digits(planes: Tensor, rows: int, features: int) -> Tensor:
    """Rewrite bytes as digits, plane after plane, padded with zeros.

    uint8 [L, T, in], little-endian → int8 [rows, features]. Digits are in [-128, 127] and their words equal those of the
    bytes mod 2^(8L). rows ≥ L·T, features ≥ in.
    """
    limbs, tokens, used = planes.shape
    digits = balanced_digits(planes).reshape(limbs * tokens, used)
    padding = (0, features - used, 0, rows - limbs * tokens)
    return torch.nn.functional.pad(digits, padding) if any(padding) else digits


def balanced_digits(planes: Tensor) -> Tensor:
    """Rewrite bytes as digits in [-128, 127] that are equal to them mod 2^(8L).

    uint8 [L, ...], little-endian → int8 [L, ...]. A byte of 128 or more becomes itself minus 256 and carries one into the
    next; the last carry is worth 2^(8L).
    """
    digits = planes.clone(memory_format=torch.contiguous_format)
    carry = planes[0] >> 7
    for k in range(1, planes.shape[0]):
        digits[k] += carry  # 255 + 1 wraps to digit 0, and carries as well: the second term
        carry = (digits[k] >> 7) | ((planes[k] & ~digits[k]) >> 7)
    return digits.view(torch.int8)


def recombine(products: Sequence[Tensor], limbs: int, tokens: int, out_features: int, reply_bits: int) -> Tensor:
    """Add the products of all digits up, and round to the bits of the reply.

    int32 [≥ (limbs - j)·T, ≥ out_features] for each weight digit j → uint8 [bytes, T, out_features]. The word is
    Σ_(j+k < limbs) products_j[plane k] · 2^(8(j+k)) mod 2^(8·limbs), rounded to its top `reply_bits`, in as few bytes as
    hold them.
    """
    word = torch.zeros(tokens, out_features, dtype=torch.int32, device=products[0].device)
    for j, product in enumerate(products):
        for k in range(limbs - j):
            word += product[k * tokens : (k + 1) * tokens, :out_features] << (8 * (j + k))
    dropped_bits, dropped_bytes = 8 * limbs - reply_bits, limbs - bytes_of(reply_bits)
    if dropped_bits:
        word += 1 << (dropped_bits - 1)
        word &= -(1 << dropped_bits)
    in_bytes = word.view(torch.uint8).view(tokens, out_features, 4)  # little-endian, as every torch platform
    return in_bytes[..., dropped_bytes:limbs].permute(2, 0, 1).contiguous()  # [bytes, T, out]
