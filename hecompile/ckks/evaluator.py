"""Operate on tensors of ciphertexts, on the worker's side, with public material only.

A `CkksTensor` is an array of element numbers into a store of ciphertexts of one level, so moving entries costs nothing; -1
is an entry that is known to be zero (masked). Every ciphertext of level l has exactly the scale Δ_l of the parameters. A
product of two is divided by the prime that makes its scale Δ_{l-1}. A constant c is encoded as
round(c·Δ_{l-1}·q_{l+1}/Δ_l). Sums of products are relinearised and rescaled once per result.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hecompile.ckks import kernels
from hecompile.ckks.keys import EvaluationKeys, Words
from hecompile.ckks.transform import tables
from hecompile.errors import InputError, LegalityError

_SPLIT_BITS = 15
_MAX_INNER = 256
"""Length up to which inner products of 30-bit words and 15-bit digits of weights are exact in float64: 2^(30 + 14 + 8) <
2^53."""


@dataclass(frozen=True, eq=False)
class CkksTensor:
    """Hold ciphertexts of one level, and where they stand in a tensor."""

    words: Words
    """uint32 `[elements, 2, level + 2, ring_dim]`."""
    index: NDArray[np.int64]
    """Element numbers, in the tensor's shape, with 1 for the batch; -1 for zero."""
    level: int

    def moved(self, index: NDArray[Any]) -> CkksTensor:
        """Return these ciphertexts in other places."""
        return CkksTensor(self.words, np.ascontiguousarray(index), self.level)

    def compact(self) -> CkksTensor:
        """Copy the elements in use, each once, so that the others can be freed."""
        used, inverse = np.unique(self.index[self.index >= 0], return_inverse=True)
        index = np.full(self.index.shape, -1, dtype=np.int64)
        index[self.index >= 0] = inverse
        return CkksTensor(self.words[used], index, self.level)


class Evaluator:
    """Operate on CkksTensors under one client's evaluation keys, in `threads` threads."""

    def __init__(self, keys: EvaluationKeys, threads: int | None = None) -> None:
        self.parameters = keys.parameters
        self._keys = keys.words
        self._tables = tables(keys.parameters.ring_dim, keys.parameters.moduli)
        self._threads = threads or os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(self._threads)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    # ------------------------------------------------------------------------------------------------------- products

    def product_sums(
        self, a: CkksTensor, b: CkksTensor, a_index: NDArray[Any], b_index: NDArray[Any], shape: tuple[int, ...]
    ) -> CkksTensor:
        """Return Σ_t a[a_index[e, t]]·b[b_index[e, t]] for each e, in `shape`; the indices are int64 `[elements, terms]`."""
        a, b = self._same_level(a, b)
        self._need_level(a)
        alive = ((a_index >= 0) & (b_index >= 0)).any(axis=1)
        out = self._empty(int(alive.sum()), a.level - 1)
        left, right = (np.ascontiguousarray(index[alive]) for index in (a_index, b_index))
        terms = kernels.Terms(a.words, left), kernels.Terms(b.words, right)
        self._run(len(out), kernels.product_sums, *terms, self._keys, self._tables, out)
        return CkksTensor(out, _numbered(alive).reshape(shape), a.level - 1)

    def multiply(self, a: CkksTensor, b: CkksTensor) -> CkksTensor:
        """Multiply entry by entry, with broadcasting."""
        left, right = np.broadcast_arrays(a.index, b.index)
        return self.product_sums(a, b, left.reshape(-1, 1), right.reshape(-1, 1), left.shape)

    def matmul(self, a: CkksTensor, b: CkksTensor) -> CkksTensor:
        """Multiply `[.., M, K]` by `[.., K, N]`, with broadcasting of the leading axes."""
        left, right = np.broadcast_arrays(a.index[..., :, None, :], np.swapaxes(b.index, -1, -2)[..., None, :, :])
        inner = left.shape[-1]
        return self.product_sums(a, b, left.reshape(-1, inner), right.reshape(-1, inner), left.shape[:-1])

    def scale(self, a: CkksTensor, constant: NDArray[np.float64]) -> CkksTensor:
        """Multiply by a constant, with broadcasting. A constant of zeros, ones and minus ones costs no level."""
        index, factors = np.broadcast_arrays(a.index, constant)
        index = np.where(factors == 0, -1, index)
        if np.isin(factors, (0, 1)).all():
            return a.moved(index)
        if np.isin(factors, (-1, 0, 1)).all():
            nothing = a.moved(np.full(a.index.shape, -1, dtype=np.int64))
            negated = self.add(nothing, a, -1)
            negative = np.broadcast_to(negated.index, index.shape) + len(a.words)
            words = np.concatenate([a.words, negated.words])
            return CkksTensor(words, np.where((factors < 0) & (index >= 0), negative, index), a.level)
        self._need_level(a)
        alive = index.reshape(-1) >= 0
        return self._scaled(a, a.level - 1, index.reshape(-1)[alive], factors.reshape(-1)[alive], alive, index.shape)

    def linear(self, a: CkksTensor, weight: NDArray[np.float64]) -> CkksTensor:
        """Multiply `[.., in]` by weight float64 `[out, in]`: `[.., out]`, by exact integer products (`_MAX_INNER`).

        An output whose weights are all zero is known to be zero.
        """
        self._need_level(a)
        (out_features, in_features), t = weight.shape, self._tables
        rows = a.index.reshape(-1, in_features)
        alive = (rows >= 0).any(axis=1)
        primes, n = self.parameters.primes(a.level), self.parameters.ring_dim
        result = self._empty(int(alive.sum()) * out_features, a.level - 1)
        sums = np.empty((out_features, 2, primes, n), dtype=np.uint32)
        integers = self._integers(weight.reshape(-1), a.level, a.level - 1)
        digits = [self._digits(integers, prime, weight.shape) for prime in self.parameters.moduli[:primes]]
        gathered = np.empty((in_features, 2 * n))
        for number, row in enumerate(rows[alive]):
            for prime in range(primes):
                self._run(in_features, kernels.gather, a.words, np.ascontiguousarray(row), prime, gathered)
                products = self._exact_product(digits[prime], gathered, prime)
                high, low = products[:out_features], products[out_features:]
                shift = float(1 << _SPLIT_BITS)
                self._run(out_features, kernels.recombine, high, low, shift, t.moduli[prime], prime, sums)
            part = result[number * out_features : (number + 1) * out_features]
            self._rescale(sums, part)
        index = np.repeat(_numbered(alive), out_features).reshape(*a.index.shape[:-1], out_features)
        offsets = np.where(index < 0, 0, index * (out_features - 1)) + np.arange(out_features)
        nothing = ~np.array(integers, dtype=bool).reshape(weight.shape).any(axis=1)
        return CkksTensor(result, np.where((index < 0) | nothing, -1, index + offsets), a.level - 1)

    def _exact_product(self, digits: NDArray[np.float64], x: NDArray[np.float64], prime: int) -> NDArray[np.float64]:
        total: NDArray[np.float64] | None = None
        for start in range(0, digits.shape[1], _MAX_INNER):
            part = torch.from_numpy(digits[:, start : start + _MAX_INNER]) @ torch.from_numpy(x[start : start + _MAX_INNER])
            if digits.shape[1] <= _MAX_INNER:
                return part.numpy()
            reduced = part.remainder_(float(self.parameters.moduli[prime])).numpy()
            total = reduced if total is None else total + reduced
        assert total is not None
        return total

    def _digits(self, integers: list[int], prime: int, shape: tuple[int, ...]) -> NDArray[np.float64]:
        """Split residues of smallest size into high · 2^15 + low: float64 `[2·out, in]`, the high ones first."""
        residues = np.array([(v + prime // 2) % prime - prime // 2 for v in integers], dtype=np.int64).reshape(shape)
        low = ((residues + (1 << _SPLIT_BITS - 1)) & ((1 << _SPLIT_BITS) - 1)) - (1 << _SPLIT_BITS - 1)
        return np.concatenate([(residues - low) >> _SPLIT_BITS, low]).astype(np.float64)

    # ----------------------------------------------------------------------------------------------------------- sums

    def add(self, a: CkksTensor, b: CkksTensor, sign: int = 1) -> CkksTensor:
        """Return a + sign·b, with broadcasting."""
        a, b = self._same_level(a, b)
        left, right = np.broadcast_arrays(a.index, b.index)
        alive = ((left >= 0) | (right >= 0)).reshape(-1)
        out = self._empty(int(alive.sum()), a.level)
        left_index, right_index = (np.ascontiguousarray(index.reshape(-1)[alive]) for index in (left, right))
        terms = kernels.Terms(a.words, left_index), kernels.Terms(b.words, right_index)
        self._run(len(out), kernels.add, *terms, sign, self._tables.moduli, out)
        return CkksTensor(out, _numbered(alive).reshape(left.shape), a.level)

    def add_constant(self, a: CkksTensor, constant: NDArray[np.float64]) -> CkksTensor:
        """Add a constant, with broadcasting.

        Raises:
            LegalityError: an entry is known to be zero, so there is no ciphertext to add to.
        """
        index, values = np.broadcast_arrays(a.index, constant)
        flat = np.ascontiguousarray(index.reshape(-1))
        if (flat[values.reshape(-1) != 0] < 0).any():
            raise LegalityError("a constant is added to an entry that a mask has made zero: fold it into the graph")
        alive = flat >= 0
        out = a.words[flat[alive]]
        integers = [round(float(v) * self.parameters.scales[a.level]) for v in values.reshape(-1)[alive]]
        self._run(len(out), kernels.add_constants, out, self._residues(integers, a.level), self._tables.moduli)
        return CkksTensor(out, _numbered(alive).reshape(index.shape), a.level)

    def reduce_sum(self, a: CkksTensor, axes: tuple[int, ...], keep: bool) -> CkksTensor:
        """Sum over axes."""
        terms, shape = sum_terms(a.index, axes, keep)
        alive = (terms >= 0).any(axis=1)
        out = self._empty(int(alive.sum()), a.level)
        self._run(len(out), kernels.sums, a.words, np.ascontiguousarray(terms[alive]), self._tables.moduli, out)
        return CkksTensor(out, _numbered(alive).reshape(shape), a.level)

    def concat(self, parts: list[CkksTensor], axis: int) -> CkksTensor:
        """Concatenate tensors at the lowest of their levels."""
        level = min(part.level for part in parts)
        lowered = [self.lowered(part, level).compact() for part in parts]
        starts = np.cumsum([0, *(len(part.words) for part in lowered[:-1])])
        indices = [np.where(p.index < 0, -1, p.index + start) for p, start in zip(lowered, starts, strict=True)]
        return CkksTensor(np.concatenate([p.words for p in lowered]), np.concatenate(indices, axis=axis), level)

    # --------------------------------------------------------------------------------------------------------- levels

    def lowered(self, a: CkksTensor, level: int) -> CkksTensor:
        """Return the values at a lower level, with its scale: one product by a constant, however far it is."""
        if level == a.level:
            return a
        a = a.compact()
        count = len(a.words)
        everything = np.ones(count, dtype=bool)
        moved = self._scaled(a, level, np.arange(count), np.ones(count), everything, (count,))
        return CkksTensor(moved.words, a.index, level)

    def truncated(self, a: CkksTensor) -> CkksTensor:
        """Keep the first two primes alone, which a client needs to decrypt; the scale stays that of a's level."""
        a = a.compact()
        return CkksTensor(np.ascontiguousarray(a.words[:, :, :2]), a.index, 0)

    def _same_level(self, a: CkksTensor, b: CkksTensor) -> tuple[CkksTensor, CkksTensor]:
        level = min(a.level, b.level)
        return self.lowered(a, level), self.lowered(b, level)

    def _need_level(self, a: CkksTensor) -> None:
        if a.level < 1:
            raise LegalityError(
                f"the graph multiplies where the {self.parameters.levels} levels are used up: run place_refreshes with "
                f"levels={self.parameters.levels}"
            )

    def _scaled(
        self, a: CkksTensor, level: int, index: NDArray[Any], factors: NDArray[Any], alive: NDArray[Any],
        shape: tuple[int, ...],
    ) -> CkksTensor:  # fmt: skip
        """Multiply a's elements by factors and rescale from level + 1 to level."""
        values, inverse = np.unique(factors, return_inverse=True)
        residues = self._residues(self._integers(values, a.level, level), level + 1)[inverse]
        scaled = self._empty(len(index), level + 1)
        self._run(
            len(index), kernels.scale, a.words, np.ascontiguousarray(index), residues, self._tables.moduli, scaled
        )
        out = self._empty(len(index), level)
        self._rescale(scaled, out)
        return CkksTensor(out, _numbered(alive).reshape(shape), level)

    def _integers(self, values: NDArray[Any], source: int, target: int) -> list[int]:
        """Encode constants so that a product at level target + 1 with scale Δ_source, rescaled, has scale Δ_target.

        Raises:
            InputError: a constant is too large.
        """
        p = self.parameters
        factor = p.scales[target] * p.moduli[p.primes(target + 1) - 1] / p.scales[source]
        if values.size and np.abs(values).max() * factor >= 2.0**62:
            raise InputError("a constant of the graph is too large for the scale: calibrate it, or fold it elsewhere")
        return [round(float(value) * factor) for value in values]

    def _residues(self, integers: list[int], level: int) -> NDArray[np.uint64]:
        moduli = self.parameters.moduli[: self.parameters.primes(level)]
        wide = np.array(integers, dtype=np.int64)[:, None]
        return np.remainder(wide, np.array(moduli, dtype=np.int64)).astype(np.uint64).reshape(-1, len(moduli))

    def _rescale(self, words: Words, out: Words) -> None:
        self._run(len(out), kernels.rescale, words, self._tables, out)

    def _empty(self, count: int, level: int) -> Words:
        return np.empty((count, 2, self.parameters.primes(level), self.parameters.ring_dim), dtype=np.uint32)

    def _run(self, count: int, kernel: Callable[..., None], *arguments: Any) -> None:
        """Run the kernel over [0, count), shared among the threads."""
        bounds = np.linspace(0, count, min(self._threads, count) + 1).astype(int) if count else np.zeros(1, dtype=int)
        futures = [
            self._pool.submit(kernel, *arguments, start, stop) for start, stop in itertools.pairwise(bounds)
        ]
        for future in futures:
            future.result()


def sum_terms(index: NDArray[np.int64], axes: tuple[int, ...], keep: bool) -> tuple[NDArray[np.int64], tuple[int, ...]]:
    """Return the terms of a sum over axes, `[elements, terms]`, and the result's shape."""
    axes = tuple(axis % index.ndim for axis in axes)
    kept = [axis for axis in range(index.ndim) if axis not in axes]
    count = int(np.prod([index.shape[axis] for axis in kept], dtype=np.int64))
    terms = index.transpose(*kept, *axes).reshape(count, -1)
    shape = tuple(1 if axis in axes else size for axis, size in enumerate(index.shape) if keep or axis not in axes)
    return terms, shape


def _numbered(alive: NDArray[Any]) -> NDArray[np.int64]:
    """Number the entries 0, 1, 2, … where alive, -1 elsewhere."""
    return np.where(alive, np.cumsum(alive) - 1, -1).astype(np.int64)
