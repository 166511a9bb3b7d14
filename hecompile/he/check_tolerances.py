"""Say how far the check sums of an honest worker deviate, and so which errors they leave unseen.

A worker rounds W·b' to multiples of G, ties up. Let 2^k be the highest power of two that divides all of row i of W. Then
W_i·b' is uniform over the multiples of U_k = 2^k·U, for b' is uniform over those of U and one weight is 2^k times an odd
number. So the rounding ρ'_i is 0 where U_k ≥ G. Else it is uniform over the multiples of U_k from U_k - G/2 to G/2, which is
U_k/2 plus independent signs times U_k/2, U_k, 2·U_k, ..., G/4. A sign is sub-Gaussian with its own variance, and so is ρ'_i:

    mean U_k/2,   variance (G² - U_k²)/12

Rows that are multiples of each other have roundings that follow from one another: identical rows have one and the same, to
which the sum of their factors belongs. Whatever the dependence, Σ_i r_i·ρ'_i over such rows is sub-Gaussian with
(Σ_i |r_i|·σ_i)² by Hölder's inequality. Other rows are taken as independent. So D is its mean plus what is sub-Gaussian with
the sum over all directions of rows, and is z standard deviations away, to either side, with probability exp(-z²/2) at most.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hecompile.errors import SecurityError
from hecompile.he.parameters import LOG_Q, LinearParameters
from hecompile.he.random.sampling import SecretRandom

GROUP = 2048
"""Outputs per check: a multiple of the features that the kernels take at a time."""
KINDS = 16
"""Powers of two that can divide a row of int16 weights that are not all 0."""

_DEVIATIONS = 8
_MEAN_SQUARE = 2.5
"""Mean of r_i², half of them 1 and half of them 4."""
_LARGEST_SQUARE = 4.0
_MISSED_BITS = 20
_HEAD = 128
"""Columns that tell nearly all rows of ordinary weights from each other and show that they have an odd weight."""
_FACTOR_BITS = 22
"""Bits of a random factor: products of 2^15 int16 weights are exact."""
_ROWS = 256
"""Rows that are turned into float64 at a time."""


class Roundings(NamedTuple):
    """Hold what deviations of check sums follow from, for the r that were drawn: both int32 `[variants, checks, KINDS]`.

    Number k is over the rows that 2^k divides and no higher power. `squares` is Σ r_i², but for rows that are multiples of
    each other the square of a sum, and theirs are counted with the smallest k. `sums` is Σ r_i.
    """

    squares: NDArray[np.int32]
    sums: NDArray[np.int32]

    @classmethod
    def of_unknown_rows(cls, vectors: NDArray[np.int32]) -> Roundings:
        """Assume that every row has an odd weight and that none is a multiple of another."""
        groups = [vectors[:, at : at + GROUP] for at in range(0, vectors.shape[1], GROUP)]
        roundings = np.zeros((2, len(vectors), len(groups), KINDS), dtype=np.int32)
        roundings[0, ..., 0] = np.stack([np.square(group).sum(axis=1) for group in groups], axis=1)
        roundings[1, ..., 0] = np.stack([group.sum(axis=1) for group in groups], axis=1)
        return cls(*roundings)

    def deviations(self, linear: LinearParameters) -> NDArray[np.float64]:
        """Return the standard deviation of D of one token that the tail is bounded by, float64 `[variants, checks]`."""
        steps = _steps(linear)
        result: NDArray[np.float64] = np.sqrt(self.squares @ np.where(steps, (linear.reply_step**2 - steps**2) / 12, 0.0))
        return result

    def means(self, linear: LinearParameters) -> NDArray[np.float64]:
        """Return the mean of D of one token, float64 `[variants, checks]`, a multiple of 1/2."""
        result: NDArray[np.float64] = self.sums @ (_steps(linear) / 2)
        return result


def _steps(linear: LinearParameters) -> NDArray[np.float64]:
    """Return U_k for each kind of row, 0 where nothing is rounded: float64 `[KINDS]`."""
    steps = linear.upload_step * 2.0 ** np.arange(KINDS)
    return np.where(steps < linear.reply_step, steps, 0.0)


def check_count(out_features: int) -> int:
    """Return the number of checks per token."""
    return math.ceil(out_features / GROUP)


def tolerance(linear: LinearParameters, square_sum: float | None = None) -> int:
    """Return the largest |D| of a token's check that passes: 8 standard deviations of an honest worker's Σ_i r_i·ρ'_i.

    D is counted from its mean. The result is 0 where the worker rounds nothing.

    Args:
        linear: the circuit, whose rows have odd weights and are no multiples of each other.
        square_sum: Σ r_i² of the check; by default the expected one of a full group.

    Raises:
        SecurityError: replies are rounded so coarsely that a wrong one could pass.
    """
    squares = _MEAN_SQUARE * min(GROUP, linear.out_features) if square_sum is None else square_sum
    spread = math.ceil(_DEVIATIONS * _deviation(linear, squares))
    require_fineness(linear, spread)
    return spread


def result_tolerance(linear: LinearParameters) -> int:
    """Return the amount from which on an error of a single result is caught with probability 1 - 2^-20 at least.

    Derivation. An error e in result i moves D by r_i·e, by at least |e|. Honest rounding makes up for z deviations of it
    with probability exp(-z²/2) at most, 2^-21 for z = √(42·ln 2) = 5.4. So if |e| is 8 + z deviations, |D| exceeds the
    tolerance but for this probability. The deviation is that of the r drawn: Σ r_i² over n outputs, independent values of 1
    and 4, exceeds 2.5·n + 3·√(n·ln(2^21)/2) with probability 2^-21 at most (Hoeffding, "Probability inequalities for sums of
    bounded random variables", JASA 1963), and 4·n never.

    If |e| is so near q/2 that 2·e is small mod q, the sum of the window sees it by the odd factors: `Checks.window`.

    The amount is 1.7 times `tolerance` at 2048 outputs, 0 where the worker rounds nothing: every error is caught then.
    """
    outputs, nats = min(GROUP, linear.out_features), (_MISSED_BITS + 1) * math.log(2)
    squares = min(_LARGEST_SQUARE * outputs, _MEAN_SQUARE * outputs + 3 * math.sqrt(outputs * nats / 2))
    return math.ceil((_DEVIATIONS + math.sqrt(2 * nats)) * _deviation(linear, squares))


def can_be_verified(linear: LinearParameters) -> bool:
    """Return whether replies of that circuit are fine enough for their check, whatever r is drawn."""
    return _is_fine(largest_tolerance(linear))


def largest_tolerance(linear: LinearParameters) -> int:
    """Return the tolerance of a check whose factors are all ±2, 0 where the worker rounds nothing."""
    return math.ceil(_DEVIATIONS * _deviation(linear, _LARGEST_SQUARE * min(GROUP, linear.out_features)))


def tolerances(linear: LinearParameters, roundings: Roundings) -> NDArray[np.int64]:
    """Return the tolerance of every check of one token, for the r that were drawn: int64 `[variants, checks]`.

    Raises:
        SecurityError: replies are rounded so coarsely that a wrong one could pass.
    """
    allowed: NDArray[np.int64] = np.ceil(_DEVIATIONS * roundings.deviations(linear)).astype(np.int64)
    require_fineness(linear, int(allowed.max(initial=0)))
    return allowed


def require_fineness(linear: LinearParameters, allowed: int) -> None:
    """Raise SecurityError where that tolerance is so near q that a wrong reply could pass."""
    if not _is_fine(allowed):
        raise SecurityError(
            f"replies of {linear.reply_bits} bits for {linear.out_features} outputs cannot be verified: ask for a "
            "higher precision, which takes more bits"
        )


def _is_fine(allowed: int) -> bool:
    return 18 * allowed < 2**LOG_Q


def _deviation(linear: LinearParameters, square_sum: float) -> float:
    """Return the standard deviation of Σ_i r_i·ρ'_i for Σ r_i² = `square_sum` and rows with odd weights."""
    if linear.reply_step <= linear.upload_step:
        return 0.0
    return math.sqrt(square_sum * (linear.reply_step**2 - linear.upload_step**2) / 12)


class Rows:
    """Describe the rows of a weight: which power of two divides each, and which are multiples of each other.

    Attributes:
        kinds: int64 `[out]`: the k of each row, KINDS for a row of zeros.
        directions: int64 `[out]`: equal for rows that are multiples of each other by a number that need not be whole.
        multiples: int64 `[out]`: with the direction equal for rows that are equal.

    Args:
        weight: int8 or int16 `[out, in]`.
        random: to tell rows from each other by. Two that are taken for multiples by chance, once in 2^44 pairs, make a
            tolerance larger by a little.
    """

    def __init__(self, weight: Tensor, random: SecretRandom) -> None:
        rows = weight.numpy()
        words = random.uniform_bytes(8 * rows.shape[1]).view(np.uint32).reshape(-1, 2)
        factors = (words >> (32 - _FACTOR_BITS)).astype(np.float64)
        self.kinds = _kinds(rows[:, :_HEAD])
        unsure = np.flatnonzero(self.kinds > 0)
        self.kinds[unsure] = _kinds(rows[unsure])
        self.directions, _ = _directions(rows[:, :_HEAD], factors)
        self.multiples = np.zeros(len(rows), dtype=np.int64)
        counts = np.bincount(self.directions)
        unsure = np.flatnonzero(counts[self.directions] > 1)
        directions, self.multiples[unsure] = _directions(rows[unsure], factors)
        self.directions[unsure] = len(counts) + directions

    def roundings(self, vectors: NDArray[np.int32]) -> Roundings:
        """Return what follows for factors int32 `[variants, out]`."""
        groups = [slice(at, at + GROUP) for at in range(0, vectors.shape[1], GROUP)]
        pairs = [self._of_group(vectors, group) for group in groups]
        return Roundings(*(np.stack(both, axis=1).astype(np.int32) for both in zip(*pairs, strict=True)))

    def _of_group(self, vectors: NDArray[np.int32], group: slice) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return squares and sums of the rows of one check, int64 `[variants, KINDS]`."""
        kinds, directions, multiples = self.kinds[group], self.directions[group], self.multiples[group]
        order = np.lexsort((multiples, directions))
        order = order[kinds[order] < KINDS]
        if not len(order):
            none = np.zeros((len(vectors), KINDS), dtype=np.int64)
            return none, none
        kinds, directions, multiples = kinds[order], directions[order], multiples[order]
        factors = vectors[:, group][:, order].astype(np.int64)
        turns = np.diff(directions, prepend=-1) != 0
        rows = np.flatnonzero(turns | (np.diff(multiples, prepend=0) != 0))  # where runs of equal rows begin
        sizes = np.abs(np.add.reduceat(factors, rows, axis=1))
        squares = np.add.reduceat(sizes, np.flatnonzero(turns[rows]), axis=1) ** 2
        smallest = np.minimum.reduceat(kinds, np.flatnonzero(turns))
        return squares @ _one_hot(smallest), factors @ _one_hot(kinds)


def _one_hot(kinds: NDArray[np.int64]) -> NDArray[np.int64]:
    return (kinds[:, None] == np.arange(KINDS)).astype(np.int64)


def _kinds(rows: NDArray[np.signedinteger]) -> NDArray[np.int64]:
    """Return the k of each row, KINDS for a row of zeros."""
    bits = np.bitwise_or.reduce(rows, axis=1).astype(np.int64)
    lowest = np.where(bits == 0, 1 << KINDS, bits & -bits)
    return np.log2(lowest).astype(np.int64)


def _directions(
    rows: NDArray[np.signedinteger], factors: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number the directions of rows, and return the first number of each row that is not 0: both int64 `[rows]`.

    Rows are compared by two random combinations of their numbers, divided by the first. Combinations are below 2^52 and
    exact, so that rows of one direction have the same quotients to the bit.
    """
    first = np.ones(len(rows), dtype=np.int64)
    prints = np.zeros((len(rows), 2))
    for at in range(0, len(rows), _ROWS):
        part = rows[at : at + _ROWS]
        there = (part != 0).argmax(axis=1)
        first[at : at + _ROWS] = part[np.arange(len(part)), there]
        prints[at : at + _ROWS] = part.astype(np.float64) @ factors[: part.shape[1]]
    quotients = prints / np.where(first == 0, 1, first)[:, None]
    _, numbers = np.unique(quotients[:, 0] + 1j * quotients[:, 1], return_inverse=True)
    return numbers.astype(np.int64).reshape(-1), first
