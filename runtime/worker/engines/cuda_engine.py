"""Evaluate circuits on the int8 tensor cores of a GPU: `torch._int_mm` between two fused kernels, weights resident.

    pinned request ─▶ planes ─▶ balanced digits ─▶ _int_mm a weight digit ─▶ word, rounding, bytes ─▶ pinned reply
                      copied    one Triton kernel   cuBLASLt                  one Triton kernel        copied

Long requests go in chunks of tokens over two streams in turn, so that the copies of one chunk run beside the products of
the other. `_int_mm` on CUDA needs more than 16 rows, inner and outer sizes that 8 divides (`_int_mm_out_cuda` in pytorch's
aten/src/ATen/native/cuda/Blas.cpp), and the right-hand side with its inner dimension contiguous (`test__int_mm` in its
test_linalg.py, where the other layouts are CUBLAS_STATUS_NOT_SUPPORTED).
The one resident copy has that layout for the circuit that was used first; the other direction transposes it on the device
for each chunk: one pass over the weight, small beside the product at a thousand tokens.

The conformance tests run everything but the CUDA calls themselves, on the CPU (`device="cpu"`). The Triton kernels run under
Triton's interpreter, and are compiled for sm_80 and sm_90. Nothing of it has run on a GPU, and its speed is unknown; there
the known-answer test of every connection decides.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hecompile.bundles.worker import CircuitSpec, WorkerBundle
from hecompile.errors import WorkerError
from hecompile.runtime.worker.engines import torch_engine
from hecompile.runtime.worker.engines.base import check_request
from hecompile.runtime.worker.engines.torch_engine import readable
from hecompile.runtime.worker.engines.weights import Weight, Weights

ROW_GRANULE, FEATURE_GRANULE = 32, 16
"""Products are padded with zeros to multiples of these; 16 features so that every row starts at 16 bytes."""

CHUNK_TOKENS = 2048
"""Tokens of one chunk: enough rows for full tensor cores, few enough that a long request overlaps with its copies."""


class Kernels(Protocol):
    """Name the functions that torch_engine.py and triton_kernels.py both have."""

    def split_digits(self, planes: Tensor, rows: int, features: int) -> Tensor: ...

    def recombine(
        self, products: Sequence[Tensor], limbs: int, tokens: int, out_features: int, reply_bits: int
    ) -> Tensor: ...


class CudaEngine:
    """Evaluate the circuits of one bundle on a GPU.

    Args:
        bundle: the circuits.
        device: "cuda", or "cpu" for tests.
        kernels: None takes Triton's where it is installed, else plain torch.
        chunk_tokens: tokens whose copies and products overlap with those of the next chunk.

    Raises:
        WorkerError: there is no such device.
    """

    name = "torch-cuda"

    def __init__(
        self,
        bundle: WorkerBundle,
        device: str = "cuda",
        kernels: Kernels | None = None,
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise WorkerError(
                "engine torch-cuda: torch finds no CUDA device; use the engine auto, torch or onnxruntime"
            )
        self._bundle = bundle
        self._device = torch.device(device)
        self._kernels = kernels or _kernels()
        self._chunk_tokens = chunk_tokens
        self._host = Weights(bundle)
        self._resident: dict[str, tuple[Tensor, ...]] = {}  # owner → int8 [out, in] a digit, padded, C order
        self._lock = threading.Lock()
        self._thread = threading.local()

    def evaluate(self, circuit: str, planes: np.ndarray) -> np.ndarray:
        """See `Engine.evaluate`."""
        spec = check_request(self._bundle, circuit, planes)
        weight = self._host[spec]
        resident = self._on_device(weight)[: len(weight.digits)]
        tokens = planes.shape[1]
        source = readable(planes)
        reply = self._pinned(spec.reply_bytes, tokens, spec.out_features)
        for number, start in enumerate(range(0, tokens, self._chunk_tokens)):
            chunk = slice(start, min(start + self._chunk_tokens, tokens))
            with self._stream(number):
                staged = self._pinned(planes.shape[0], chunk.stop - start, spec.in_features)
                staged.copy_(source[:, chunk])  # on the CPU, while the GPU works on the chunk before
                result = self._product(staged.to(self._device, non_blocking=True), spec, resident, weight.transposed)
                for plane, target in zip(result, reply[:, chunk], strict=True):  # each is one contiguous copy
                    target.copy_(plane, non_blocking=True)
        self._synchronize()
        return reply.numpy()

    def _product(self, planes: Tensor, spec: CircuitSpec, resident: Sequence[Tensor], transposed: bool) -> Tensor:
        """Multiply on the device: uint8 [limbs, T, in] → uint8 [reply_bytes, T, out]."""
        limbs, tokens, _ = planes.shape
        digits = self._kernels.split_digits(planes, _round_up(limbs * tokens, ROW_GRANULE), _padded(spec.in_features))
        products = []
        for j, stored in enumerate(resident):
            matrix = stored.t().contiguous() if transposed else stored  # int8 [out, in] of this circuit, in contiguous
            needed = _round_up((limbs - j) * tokens, ROW_GRANULE)  # the rows beyond count for nothing in `recombine`
            products.append(torch._int_mm(digits[:needed], matrix.t()))
        return self._kernels.recombine(products, limbs, tokens, spec.out_features, spec.reply_bits)

    def _on_device(self, weight: Weight) -> tuple[Tensor, ...]:
        with self._lock:
            if weight.owner not in self._resident:
                # All digits of the owner, which may have more limbs than the circuit that shares it.
                owned = self._host[self._bundle.circuits[weight.owner]]
                self._resident[weight.owner] = tuple(self._padded_transpose(digit) for digit in owned.digits)
                self._synchronize_device()  # the streams of other threads read it
            return self._resident[weight.owner]

    def _padded_transpose(self, digit: np.ndarray) -> Tensor:
        in_features, out_features = digit.shape
        stored = torch.zeros(_padded(out_features), _padded(in_features), dtype=torch.int8, device=self._device)
        stored[:out_features, :in_features] = readable(digit).to(self._device).t()
        return stored

    def _pinned(self, *shape: int) -> Tensor:
        """Allocate uint8 in memory that the GPU copies from and to by itself; torch keeps it for the next request."""
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda")

    def _stream(self, number: int) -> AbstractContextManager[object]:
        if self._device.type != "cuda":
            return nullcontext()
        return torch.cuda.stream(self._streams()[number % 2])

    def _streams(self) -> list[torch.cuda.Stream]:
        """Return the two streams of the calling thread, so that requests of several connections overlap as well."""
        if not hasattr(self._thread, "streams"):
            self._thread.streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        streams: list[torch.cuda.Stream] = self._thread.streams
        return streams

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            for stream in self._streams():
                stream.synchronize()

    def _synchronize_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def _kernels() -> Kernels:
    try:
        from hecompile.runtime.worker.engines import triton_kernels
    except ImportError:  # a build of torch without Triton: slower, the same bytes
        return torch_engine
    return triton_kernels


def _padded(features: int) -> int:
    return _round_up(features, FEATURE_GRANULE)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
