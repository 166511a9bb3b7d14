"""Evaluate circuits in one fused kernel for AVX512-VNNI (`vnni_kernel`), the fastest engine where the CPU has it."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from hecompile.bundles.worker import WorkerBundle
from hecompile.errors import WorkerError
from hecompile.runtime.worker.engines.base import check_request
from hecompile.runtime.worker.engines.vnni_kernel import product_kernel, supported
from hecompile.runtime.worker.engines.vnni_tile import CACHE_LINE, PANEL, TILE_TOKENS
from hecompile.runtime.worker.engines.weights import Weights

PIECES_PER_THREAD = 16
"""Pieces of work for each thread, so that none waits long for the last; wide layers have so many panels anyway."""

PACKING_TOKENS = 10
"""Packing a panel takes about as long as multiplying so many tokens."""

SMALLEST_BLOCK = 256
"""Fewest tokens in a piece of work, so that packing its panel pays."""

WORK_PER_THREAD = 10_000_000
"""Products of a weight digit and a token, packing included, that a thread is worth waking for: about 0.15 ms."""


class VnniEngine:
    """Evaluate the circuits of one bundle on several threads.

    Requests from several threads at once share the pool; each makes progress with its caller's thread alone. Memory beside
    the mapped weights: the request, the reply, and 64 · in_features bytes for each weight digit and thread.

    Args:
        bundle: the circuits.
        threads: threads of one request at most; 0 takes every core that this process may use.

    Raises:
        WorkerError: the CPU has no AVX512-VNNI.
    """

    name = "vnni"

    def __init__(self, bundle: WorkerBundle, threads: int = 0) -> None:
        if not supported():
            raise WorkerError("engine vnni: this CPU has no AVX512-VNNI; use the engine onnxruntime or torch")
        self._bundle = bundle
        self._weights = Weights(bundle)
        self._threads = threads or len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(max(self._threads - 1, 1), thread_name_prefix="vnni")

    def evaluate(self, circuit: str, planes: np.ndarray) -> np.ndarray:
        """See `Engine.evaluate`."""
        spec = check_request(self._bundle, circuit, planes)
        weight = self._weights[spec]
        limbs, tokens, _ = planes.shape
        digits = tuple(digit.view(np.uint8) for digit in weight.digits)
        quads = -(-spec.in_features // 4)
        planes = _in_quads(planes, quads)
        threads = min(self._threads, threads_worth(spec.in_features * spec.out_features * len(digits), tokens))
        block = block_tokens(tokens, spec.out_features, limbs, threads)
        reply = np.empty((spec.reply_bytes, tokens, spec.out_features), dtype=np.uint8)
        counter = np.zeros(1, dtype=np.int64)
        work = product_kernel(limbs, len(digits))

        def share() -> None:
            packed = aligned((len(digits), quads, PANEL))
            work(planes, digits, weight.transposed, block, counter, packed, reply, spec.reply_bits)

        helpers: list[Future[None]] = [self._pool.submit(share) for _ in range(threads - 1)]
        share()
        for helper in helpers:
            if not helper.cancel():  # one that has not begun has nothing left to do
                helper.result()
        return reply


def threads_worth(weight_digits: int, tokens: int) -> int:
    """Return how many threads are worth waking for a request: more would take longer than they save."""
    return max(1, weight_digits * (tokens + PACKING_TOKENS) // WORK_PER_THREAD)


def block_tokens(tokens: int, out_features: int, limbs: int, threads: int) -> int:
    """Return the tokens of one piece of work, a multiple of the tile's: all, unless there are too few panels to share."""
    panels = -(-out_features // PANEL)
    blocks = min(-(-PIECES_PER_THREAD * threads // panels), max(tokens // SMALLEST_BLOCK, 1))
    tile = TILE_TOKENS[limbs]
    return -(-tokens // (blocks * tile)) * tile


def aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Allocate uint32, uninitialised, at the start of a cache line."""
    size = 4 * int(np.prod(shape))
    room = np.empty(size + CACHE_LINE, dtype=np.uint8)
    start = -room.ctypes.data % CACHE_LINE
    return room[start : start + size].view(np.uint32).reshape(shape)


def _in_quads(planes: np.ndarray, quads: int) -> np.ndarray:
    """Return read-only uint8 [limbs, T, 4 · quads] in C order, padded with zeros where the features are not whole quads."""
    if planes.shape[2] != 4 * quads:
        padded = np.zeros((*planes.shape[:2], 4 * quads), dtype=np.uint8)
        padded[..., : planes.shape[2]] = planes
        planes = padded
    view = np.ascontiguousarray(planes).view()
    view.flags.writeable = False  # numba compiles for each kind of array; one is enough
    return view
