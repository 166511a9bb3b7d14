"""Group the arguments of kernels into named tuples, which numba takes like any other argument."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Address = Any
"""An integer inside kernels: see `vectors.address` and `vectors.real_address`."""


class Ring(NamedTuple):
    """Describe a ring to the kernels; `transform.ring_of` makes it."""

    n: int
    """Points of a transform: ring_dim / 2."""
    rank: int
    packing: int
    """Groups of features that share a ring element: the rank of a packed ring, 1 otherwise."""
    roots: NDArray[Any] | Address
    """The array that `transform.roots` makes; its address where one kernel calls another."""
    root_count: int


class Strided(NamedTuple):
    """Locate things in memory: thing k begins `at + k · step` numbers after the address `start`."""

    start: Address
    at: int
    step: int


class Secrets(NamedTuple):
    """Locate the transformed secrets of blocks of tokens, `per_block` polynomials for each block.

    A product takes `rank` of these: numbers `first`, `first + step`, `first + 2 · step` and so on.
    """

    start: Address
    first: int
    step: int
    per_block: int


class Prefetch(NamedTuple):
    """Name `size` bytes from the address `start` on, to be fetched into the cache for a later use."""

    start: Address
    size: int


class HintArrays(NamedTuple):
    """Hold rows of H in one of three forms: transforms of words, used where there are any, or words, or packed words."""

    words: NDArray[np.int32]
    """`[groups, rank, 2n, 8]`; where they are packed, memory for one group."""
    transformed: NDArray[Any]
    """`[groups, rank, n, 2, 8]`, float64 or float32, or empty."""
    packed: NDArray[np.uint8]
    """`[groups, bits, rank · 2n]` as `hint_words` has it, or empty."""
    bits: int
    """Bits of a packed word."""


class Extent(NamedTuple):
    """Say how much one call works on: all tokens of some features, the first of which begins group `group`."""

    group: int
    features: int
    tokens: int


class Rows(NamedTuple):
    """Locate reals, token by token: feature j of token t is number `start + t · stride + j` of `values`."""

    values: NDArray[np.float32]
    start: int
    stride: int


class Planes(NamedTuple):
    """Locate wire bytes: byte l of feature j of token t is number `start + l · plane + t · row + j` of `wire`.

    A word has so many `bits`, the highest of as few whole bytes as hold them; those below are 0.
    """

    wire: NDArray[np.uint8]
    start: int
    plane: int
    row: int
    bits: int
    past_caches: bool = False
    """Whether to write past the caches, where whole lines of 64 features are cache lines."""


class Scales(NamedTuple):
    """Hold what values are multiplied with: float64 `[tokens]` and `[features]`."""

    tokens: NDArray[np.float64]
    features: NDArray[np.float64]


class CheckSums(NamedTuple):
    """Hold what the sums of verification are made of, and the sums, which a kernel adds to.

    Each sum is Σ_j word_j · vector_j mod 2^32, where word_j is that of feature j after rounding. A kernel uses all lanes of
    a sum and leaves the sum in the first. A token has a sum by the variant that checks it. The tokens of a window are added
    up, and each such total has a sum by every variant.
    """

    vectors: NDArray[Any]
    """`[lines, rows, 64]` of `Checks`, from the first feature on; no rows where nothing is checked. To encrypt, the images,
    int32; to decrypt, the vectors, int8."""
    drawn: NDArray[np.int64]
    """The variants of the vectors that check single tokens: what is prefetched."""
    variants: NDArray[np.int64]
    """`[tokens]`: which of them checks a token."""
    sums: NDArray[np.int32]
    """`[checks, tokens, SUM_LANES]`."""
    window: int
    """Tokens of a window; the last may have fewer."""
    totals: NDArray[np.int32]
    """Scratch for totals: `[windows, 64]` as many times as a tile has lines of a token."""
    total_sums: NDArray[np.int32]
    """`[windows, variants · checks, SUM_LANES]`."""
    features: int
    """Features that one check covers; a multiple of 64 where there are several checks."""


class Scratch(NamedTuple):
    """Hold memory for a kernel to work in: the words of a tile, and reals of `rank · 16 · n` and of `16 · n` numbers."""

    tile: NDArray[np.int32]
    values: NDArray[Any]
    work: NDArray[Any]
