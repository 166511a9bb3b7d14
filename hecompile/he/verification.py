"""Check the worker's products without computing them, by secret vectors made at setup and their products with W.

At setup the client draws r ∈ {±1, ±2}^out and keeps v = rᵀ·W (Freivalds, "Probabilistic machines can use less running
time", IFIP 1977). A product sends words b' mod q and gets words Y' = W·b' + ρ' mod q, where ρ' is the worker's own rounding
to R bytes: |ρ'_i| ≤ G/2, and 0 where nothing is rounded. For an honest worker

    D = Σ_i r_i·Y'_i - Σ_j v_j·b'_j = Σ_i r_i·ρ'_i   (mod q, centred)

is small. The tolerance is 8 standard deviations of the right-hand side for the r that were drawn. With ρ'_i independent and
uniform, which is sub-Gaussian with its own variance, |D| exceeds the tolerance with probability below 2·exp(-32) < 3e-14
for each check. A reply is accepted if |D| is within the tolerance for every check of every token.

**Caught.** Let the reply of a token be W·b' + δ mod q, from a worker that does not know r: nothing that it is sent depends
on r. Let |δ_i| > 2·tolerance for some output i, and let the other r have any values. The four values of r_i move D by ±δ_i
and ±2·δ_i. Two of them can both be within tolerance only if their difference, one of δ_i, 2·δ_i, 3·δ_i and 4·δ_i, is 0 mod
q to within 2·tolerance. Any three of the four have a pair that differs by δ_i itself. So:

* any reply with such an error in a token is caught with probability at least 1/2, and at least 3/4 unless δ_i is near a
  half, third or quarter of q (signs alone would always miss two outputs that are both off by q/2);
* an error in one output alone, and not by about q/2, is always caught;
* VARIANTS independent r are kept, and each token is checked by one that is drawn afresh for each request. So a lie to m
  tokens is missed with probability Σ_k P(k distinct variants are met)·2^-k at most: near 2^-m for few, 2^-8 for many. The r
  are kept as long as the bundle, and a lie that passed once may pass again: export again after a worker was caught;
* a reply to something else (an old one, another layer's, another client's) makes D uniform over the multiples of the finer
  step. Then a token passes with probability about 2·tolerance/q: half a percent at 2048 outputs and 2 bytes of reply, 11 %
  for the coarsest replies that are admitted. A batch practically never passes.

**Not caught** are errors below the tolerance. `inspect` shows the tolerance in standard deviations of the noise of
decryption; at 2048 outputs it is some hundreds of them, a tenth to a half of a typical result. So a worker can, without
risk, add a bias of some percent to single results of its choice. Only the Euclidean norm of all that it adds to a token is
held near that of the noise. `LinearParameters` whose tolerance comes near q cannot be checked and are refused.

The check looks at ciphertext words, replies and r, and at nothing decrypted. What the client does after it tells nothing
about data, adapter or encryption secrets, only about r. A check covers GROUP outputs. A wider reply has several checks,
each with a v of its own, so that the tolerance does not grow with the width.
"""

from __future__ import annotations

import math
import threading

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hecompile.errors import InputError, SecurityError, VerificationError
from hecompile.he.kernels.transform import aligned
from hecompile.he.parameters import LOG_Q, LinearParameters
from hecompile.he.random.sampling import SecretRandom, Unsharable

VARIANTS = 8
GROUP = 2048
"""Outputs per check: a multiple of _LINE."""

_LINE = 64
"""Features that the kernels take at a time."""

_DEVIATIONS = 8
_MEAN_SQUARE = 2.5
"""Mean of r_i², with r_i uniform over ±1 and ±2."""
_LARGEST_SQUARE = 4.0
_LARGEST_INPUTS = 2**15


def check_count(out_features: int) -> int:
    """Return the number of checks per token."""
    return math.ceil(out_features / GROUP)


def tolerance(linear: LinearParameters, square_sum: float | None = None) -> int:
    """Return the largest |D| of a check that passes: 8 standard deviations of an honest worker's Σ_i r_i·ρ'_i.

    ρ' is uniform over the multiples of U within ±G/2, so its mean square is (G² - U²)/12, plus (U/2)² for ties that all
    go up. The result is 0 where the worker rounds nothing.

    Args:
        linear: the circuit.
        square_sum: Σ r_i² of the check; by default the expected one of a full group.

    Raises:
        SecurityError: replies are rounded so coarsely that a wrong one could pass.
    """
    coarse, fine = linear.reply_step, linear.upload_step
    if coarse <= fine:
        return 0
    squares = _MEAN_SQUARE * min(GROUP, linear.out_features) if square_sum is None else square_sum
    spread = _spread(linear, squares)
    if 18 * spread >= 2**LOG_Q:
        raise SecurityError(
            f"replies of {linear.reply_bytes} byte(s) for {linear.out_features} outputs cannot be verified: ask for a "
            "higher precision, which takes more bytes"
        )
    return spread


def can_be_verified(linear: LinearParameters) -> bool:
    """Return whether replies of that circuit are fine enough for their check, whatever r is drawn."""
    if linear.reply_step <= linear.upload_step:
        return True
    return 18 * _spread(linear, _LARGEST_SQUARE * min(GROUP, linear.out_features)) < 2**LOG_Q


def _spread(linear: LinearParameters, square_sum: float) -> int:
    """Return 8 standard deviations of Σ_i r_i·ρ'_i, rounded up, for Σ r_i² = `square_sum`."""
    coarse, fine = linear.reply_step, linear.upload_step
    return math.ceil(_DEVIATIONS * math.sqrt(square_sum * ((coarse**2 - fine**2) / 12 + fine**2 / 4)))


class Checks(Unsharable):
    """Hold the secret of one circuit; whoever knows it can cheat, and learns nothing else.

    Attributes:
        vectors: the r, int32 `[VARIANTS, out]`.
        images: the v, int32 `[VARIANTS, checks, in]`.
        vectors_by_lines: the r for the kernels, int32 `[lines, VARIANTS, 64]`.
        images_by_lines: the v for the kernels, int32 `[lines, VARIANTS · checks, 64]`.

    Raises:
        InputError: shapes or types do not fit together.
    """

    __slots__ = ("_squares", "_tolerances", "images", "images_by_lines", "vectors", "vectors_by_lines")

    def __init__(self, vectors: NDArray[np.int32], images: NDArray[np.int32]) -> None:
        variants, outputs = vectors.shape
        if vectors.dtype != np.int32 or images.dtype != np.int32 or images.shape[:2] != (variants, check_count(outputs)):
            raise InputError("the check vectors of a circuit do not fit together: export again")
        self._squares = np.stack(  # float64 [VARIANTS, checks]: Σ r_i²
            [np.square(vectors[:, at : at + GROUP], dtype=np.float64).sum(axis=1) for at in range(0, outputs, GROUP)], axis=1
        )
        self.vectors, self.images = np.ascontiguousarray(vectors), np.ascontiguousarray(images)
        self._tolerances: tuple[LinearParameters, NDArray[np.int64]] | None = None
        self.vectors_by_lines = _by_lines(self.vectors)
        self.images_by_lines = _by_lines(self.images.reshape(-1, self.images.shape[2]))

    @classmethod
    def draw(cls, weight: Tensor, random: SecretRandom) -> Checks:
        """Draw check vectors for int8 or int16 `weight [out, in]`, in ≤ 32768.

        Raises:
            SecurityError: `random` is anything but a SecretRandom.
            InputError: the weight has another type or shape.
        """
        if type(random) is not SecretRandom:
            raise SecurityError("check vectors are drawn from SecretRandom, never from a public seed or stream")
        if weight.dtype not in (torch.int8, torch.int16) or weight.dim() != 2 or weight.shape[1] > _LARGEST_INPUTS:
            raise InputError(f"a weight is int8 or int16 [out, in], got {weight.dtype} {list(weight.shape)}")
        outputs = len(weight)
        drawn = random.below_power_of_two(2, VARIANTS * outputs).reshape(VARIANTS, outputs)
        vectors = np.array([-2, -1, 1, 2], dtype=np.int32)[drawn]
        # Sums of GROUP int8 are at most 2^19 and exact in float32; of int16 at most 2^27, in float64.
        exact = torch.float32 if weight.dtype == torch.int8 else torch.float64
        groups = [slice(at, at + GROUP) for at in range(0, outputs, GROUP)]
        images = [torch.from_numpy(vectors[:, group]).to(exact) @ weight[group].to(exact) for group in groups]
        return cls(vectors, torch.stack(images, dim=1).to(torch.int32).numpy())

    def tolerances(self, linear: LinearParameters) -> NDArray[np.int64]:
        """Return the tolerance of every check, int64 `[VARIANTS, checks]`: see `tolerance`."""
        if self._tolerances is None or self._tolerances[0] != linear:
            allowed = [[tolerance(linear, float(square)) for square in row] for row in self._squares]
            self._tolerances = linear, np.array(allowed, dtype=np.int64)
        return self._tolerances[1]

    def check_fits(self, linear: LinearParameters) -> None:
        """Check the shape of the circuit, which the kernels do not.

        Raises:
            InputError: these are the check vectors of a circuit of another shape.
        """
        if self.vectors.shape[1] != linear.out_features or self.images.shape[2] != linear.in_features:
            raise InputError("the check vectors are of another circuit: export again")

    def pack(self) -> NDArray[np.int32]:
        """Return what a file holds: int32 `[VARIANTS, out + checks · in]`."""
        return np.concatenate([self.vectors, self.images.reshape(len(self.images), -1)], axis=1)

    @classmethod
    def unpack(cls, packed: NDArray[np.int32], linear: LinearParameters) -> Checks:
        """Invert `pack` for that circuit.

        Raises:
            InputError: the array has another size or type, or values that no r has.
        """
        outputs, inputs = linear.out_features, linear.in_features
        wanted = (VARIANTS, outputs + check_count(outputs) * inputs)
        if packed.dtype != np.int32 or packed.shape != wanted or not np.isin(np.abs(packed[:, :outputs]), (1, 2)).all():
            raise InputError(f"check vectors of int32 {list(wanted)} were wanted, got {packed.dtype} {list(packed.shape)}")
        return cls(packed[:, :outputs], packed[:, outputs:].reshape(VARIANTS, -1, inputs))


def _by_lines(rows: NDArray[np.int32]) -> NDArray[np.int32]:
    """Cut rows into lines of 64 features: int32 `[rows, features]` → `[lines, rows, 64]`, padded with zeros, aligned.

    What the kernels want for a line then lies together. The rows themselves would compete for the same few cache sets.
    """
    count, features = rows.shape
    lines = -(-features // _LINE)
    flat: NDArray[np.int32] = aligned(lines * count * _LINE, np.int32)
    flat[:] = 0
    result = flat.reshape(lines, count, _LINE)
    whole = features // _LINE
    result[:whole] = rows[:, : whole * _LINE].reshape(count, whole, _LINE).transpose(1, 0, 2)
    if whole < lines:
        result[whole, :, : features - whole * _LINE] = rows[:, whole * _LINE :]
    return result


class _Sums:
    """Add up sums mod q, int32 `[T, checks]`, from the parts of several threads."""

    def __init__(self, tokens: int, checks: int) -> None:
        self.sums = np.zeros((tokens, checks), dtype=np.int32)
        self._lock = threading.Lock()

    def add(self, part: NDArray[np.int32], limbs: int, piece: slice) -> None:
        """Add the sums over some of the features for a piece of the tokens.

        Args:
            part: int32 `[checks, tokens, SUM_LANES]`, whose lanes belong together.
            limbs: bytes to which the words in the sums were cut.
            piece: which tokens.
        """
        whole = (part[..., 0] + part[..., 1] + part[..., 2] + part[..., 3]) << (LOG_Q - 8 * limbs)
        with self._lock:
            self.sums[piece] += whole.T


class Expectation(_Sums):
    """Hold what the reply to one request must sum to: Σ_j v_j·b'_j.

    `variants`, int64 `[T]`, says which variant checks each token.
    """

    def __init__(self, checks: Checks, variants: NDArray[np.int64]) -> None:
        super().__init__(len(variants), checks.images.shape[1])
        self.checks, self.variants = checks, variants

    @classmethod
    def draw(cls, checks: Checks, tokens: int, random: SecretRandom) -> Expectation:
        """Start a request of `tokens` tokens with freshly drawn variants."""
        return cls(checks, random.below_power_of_two(VARIANTS.bit_length() - 1, tokens))


class Received(_Sums):
    """Hold what a reply sums to: Σ_i r_i·Y'_i, or nothing where there is no expectation to check it by."""

    def __init__(self, expectation: Expectation | None, tokens: int) -> None:
        super().__init__(tokens, 0 if expectation is None else expectation.sums.shape[1])
        self._expectation = expectation

    def verify(self, linear: LinearParameters) -> None:
        """Verify the reply: |D| ≤ tolerance for every check of every token.

        Raises:
            VerificationError: a token deviates by more; the message says how many do.
        """
        if self._expectation is None:
            return
        expectation = self._expectation
        deviation = np.abs((self.sums - expectation.sums).astype(np.int64))  # int32 wraps: centred
        allowed = expectation.checks.tolerances(linear)[expectation.variants]  # [T, checks]
        wrong = int((deviation > allowed).any(axis=1).sum())
        if wrong:
            # The message shows no deviation: a worker could arrange it to spell out some of r for whoever sees the log.
            raise VerificationError(
                f"{wrong} of {len(deviation)} tokens of the reply are not the product that was asked for: their check sums "
                "deviate by more than rounding can explain"
            )


def hint_is_right(checks: Checks, coefficients: Tensor, matrix: Tensor) -> bool:
    """Return whether H = W·A mod q, by every variant: H int32 `[out, n]`, A int32 `[in, n]`.

    Nothing is rounded, and every variant looks at all of H: a wrong H passes with probability 2^-VARIANTS at most.
    """
    for group in range(checks.images.shape[1]):
        rows = slice(group * GROUP, (group + 1) * GROUP)
        left = torch.from_numpy(checks.vectors[:, rows]).double() @ coefficients[rows].double()  # exact: below 2^43
        image = torch.from_numpy(checks.images[:, group]).double()
        right = torch.zeros(left.shape, dtype=torch.int64)
        for place in range(4):  # byte by byte, so that sums are below 2^27 · 2^8 · 2^15 and exact
            digits = ((matrix >> (8 * place)) & 255).double()
            right += (image @ digits).to(torch.int64) << (8 * place)
        if not torch.equal(left.to(torch.int64).to(torch.int32), right.to(torch.int32)):
            return False
    return True
