"""The circuits as `torch._int_mm` (int8 × int8 → int32): VNNI on the CPU, the int8 tensor cores on CUDA.

Bytes are unsigned and `_int_mm` is signed, so the word is rewritten in balanced digits, d_l in [-128, 127] with
Σ d_l · 2^(8l) ≡ word mod 2^(8L). On words that is `(b + 0x80808080) ^ 0x80808080` read as int8; on byte planes it is
the same carry chain, one plane after the other, without gathering bytes into words (5 times faster, measured).
|product| ≤ 128 · 128 · in stays below 2^31 for in < 131072. Later arithmetic is int32, which torch wraps mod 2^32.

The tests run the padding that CUDA needs on the CPU, and no GPU: there the known-answer test of every connection decides.
"""

from __future__ import annotations

import threading

import numpy as np
import torch

from hecompile.errors import WorkerError
from hecompile.worker_bundle import CircuitSpec, WorkerBundle
from runtime.engines.base import check_request

CPU_GRANULE = (1, 1, 1)
CUDA_GRANULE = (32, 8, 8)
"""`_int_mm` on CUDA takes only more than 16 rows, and inner and outer sizes that 8 divides (`_int_mm_out_cuda` in
aten/src/ATen/native/cuda/Blas.cpp); operands are padded with zeros to multiples of these (rows, in, out)."""


class TorchEngine:
    """One weight per linear: `<linear>.backward` is a transposed view of `<linear>.forward` where the bundle has both.

    device: "cpu" or "cuda". granule: multiples of (rows, in, out) that products are padded to; None takes the device's.
    Raises WorkerError when the device is not there.
    """

    def __init__(self, bundle: WorkerBundle, device: str = "cpu", granule: tuple[int, int, int] | None = None) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise WorkerError("engine torch-cuda: torch finds no CUDA device; use the engine torch or onnxruntime")
        self.name = "torch" if device == "cpu" else f"torch-{device}"
        self._bundle = bundle
        self._device = torch.device(device)
        self._granule = granule or (CPU_GRANULE if device == "cpu" else CUDA_GRANULE)
        self._weights: dict[str, tuple[torch.Tensor, ...]] = {}  # circuit → int8 [in, out] per weight digit, padded
        self._lock = threading.Lock()

    def evaluate(self, circuit: str, planes: np.ndarray) -> np.ndarray:
        """See `Engine.evaluate`."""
        spec = check_request(self._bundle, circuit, planes)
        weights = self._weight(spec)
        limbs, tokens, _ = planes.shape
        # torch shares the request's memory and only reads it; a request from a socket is not writable, hence the copy.
        request = torch.from_numpy(planes if planes.flags.writeable else planes.copy()).to(self._device)
        digits = balanced_digits(request).reshape(limbs * tokens, spec.in_features)
        word = torch.zeros(tokens, spec.out_features, dtype=torch.int32, device=self._device)
        for j, weight in enumerate(weights):
            needed = (limbs - j) * tokens  # a term with j + k ≥ limbs is 0 mod 2^(8·limbs)
            products = self._product(digits[:needed], weight)[:needed, : spec.out_features]
            for k, product in enumerate(products.reshape(limbs - j, tokens, spec.out_features)):  # int32
                word += product << (8 * (j + k))
        dropped_bytes = limbs - spec.reply_bytes
        if dropped_bytes:
            word += 1 << (8 * dropped_bytes - 1)
        in_bytes = word.view(torch.uint8).view(tokens, spec.out_features, 4)  # little-endian, as every torch platform
        return in_bytes[..., dropped_bytes:limbs].permute(2, 0, 1).contiguous().cpu().numpy()  # [reply_bytes, T, out]

    def _product(self, digits: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """int8 [n, in] × int8 [in', out'] → int32 [n', out'], the primed sizes padded to the granule."""
        rows = _round_up(digits.shape[0], self._granule[0])
        padding = (0, weight.shape[0] - digits.shape[1], 0, rows - digits.shape[0])
        if any(padding):
            digits = torch.nn.functional.pad(digits, padding)
        return torch._int_mm(digits, weight)

    def _weight(self, spec: CircuitSpec) -> tuple[torch.Tensor, ...]:
        with self._lock:
            if spec.name not in self._weights:
                self._weights[spec.name] = self._load(spec)
            return self._weights[spec.name]

    def _load(self, spec: CircuitSpec) -> tuple[torch.Tensor, ...]:
        digits = self._bundle.weight_digits(spec.name)[: spec.upload_limbs]  # int8 [in, out] each
        other = f"{spec.linear}.{'backward' if spec.direction == 'forward' else 'forward'}"
        shared = self._weights.get(other, ())
        stored = [
            digit[: spec.out_features, : spec.in_features].cpu().numpy() for digit in shared
        ]  # int8 [out, in] each
        # Compared and not assumed: the manifest says which circuits are a pair, the files say whether they are.
        if len(stored) == len(digits) and all(np.array_equal(a.T, b) for a, b in zip(stored, digits, strict=True)):
            return tuple(digit.t() for digit in shared)
        return tuple(self._padded(spec, digit) for digit in digits)

    def _padded(self, spec: CircuitSpec, digit: np.ndarray) -> torch.Tensor:
        in_features = _round_up(spec.in_features, self._granule[1])
        out_features = _round_up(spec.out_features, self._granule[2])
        weight = torch.zeros(in_features, out_features, dtype=torch.int8)
        weight[: spec.in_features, : spec.out_features] = torch.from_numpy(np.array(digit))
        return weight.to(self._device)


def balanced_digits(planes: torch.Tensor) -> torch.Tensor:
    """uint8 [L, ...] little-endian bytes → int8 [L, ...] digits in [-128, 127], equal to them mod 2^(8L).

    A byte of 128 or more becomes itself minus 256 and carries one into the next; the last carry is worth 2^(8L).
    """
    digits = planes.clone()
    carry = planes[0] >> 7
    for k in range(1, planes.shape[0]):
        digits[k] += carry  # 255 + 1 wraps to digit 0, and carries as well: the second term
        carry = (digits[k] >> 7) | ((planes[k] & ~digits[k]) >> 7)
    return digits.view(torch.int8)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
