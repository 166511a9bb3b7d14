"""Check the worker's products without computing them, by secret vectors made at setup and their products with W.

At setup the client draws r ∈ {±1, ±2}^out and keeps v = rᵀ·W (Freivalds, "Probabilistic machines can use less running
time", IFIP 1977). A product sends words b' mod q and gets words Y' = W·b' + ρ' mod q, where ρ' is the worker's own rounding
to multiples of G: |ρ'_i| ≤ G/2, with the mean m_i ≥ 0, for ties go up; 0 where nothing is rounded. For an honest worker

    D = Σ_i r_i·(Y'_i - m_i) - Σ_j v_j·b'_j = Σ_i r_i·(ρ'_i - m_i)   (mod q, centred)

is small. The tolerance is 8 standard deviations of the right-hand side for the r that were drawn and the rows of W
(`check_tolerances`). |D| exceeds it with probability below 2·exp(-32) < 3e-14 for each check of an honest reply. A reply is
accepted if every check is within its tolerance:

* token by token, by one of TOKEN_VARIANTS r, drawn for the token. Which these are of all VARIANTS is drawn for the request;
* by all VARIANTS r, the sum of the tokens of a window: of a token alone in a request of up to SMALL tokens, else of up to
  LONGEST_WINDOW neighbours. Its D is the sum of theirs, the tolerance grows with the root of their number.

**Caught.** Let the reply be W·b' + m + δ mod q, from a worker that does not know r: nothing that it is sent depends on r.
Call an error visible to a check if some |δ_i| is more than twice the tolerance, whichever r_i is drawn. Fix the factors of
all outputs but i. The four values of r_i move D by ±δ_i and ±2·δ_i. Two that differ by δ_i itself, so 1 and 2 or -1 and -2,
cannot both pass. So at most two of the four values pass.

* *The sum of a window is wrong, visibly to its checks*, as it is if a single token is: that passes with probability
  MISSED = 1/C(V, V/2) = 2^-23.3 at most, where V is VARIANTS. Proof. Let n_v(p) be how many of the two values of parity p
  pass in variant v: n_v(0) + n_v(1) ≤ 2. Signs are uniform, so parities p_v pass with probability Π n_v(p_v)/2. Half of an
  output's V factors are odd, and each half is equally likely, with probability MISSED. So the reply passes with at most
  MISSED · Σ_p Π_v n_v(p_v)/2 = MISSED · Π_v (n_v(0) + n_v(1))/2 ≤ MISSED.
* *One output of one token is wrong*, by `check_tolerances.result_tolerance` or more, and all else is honest: caught but
  with probability 2^-20, and from twice the tolerance on but with that of an honest reply that fails. Unless the error is
  so near q/2 that twice of it is small mod q, the token's check sees it, whatever its variant. If it is, half of the
  variants have r_i odd and see it in the total, whose tolerance is q/11 at most. (Factors ±1 alone would never see two
  outputs that are both off by q/2, nor even factors one.)
* *Tokens are wrong, visibly to their checks, and their sum is not*: they pass with probability Π_{j<k} (V/2)/(V - j) at most
  if they meet k distinct variants (MOST_LIKELY). For, given j of its factors, an output's next one has neither parity with a
  higher probability than that. For k from 1 to 8 this is 0.5, 0.26, 0.14, 0.08, 0.05, 0.03, 0.02 and 0.013. Two tokens share
  a variant with probability 1/8, so that m of them meet fewer than m: 2, 4, 6, 8 and many pass with probability 0.29, 0.13,
  0.07, 0.05 and 0.013. A lie told again in further requests meets further variants; it passes all V with probability MISSED.
* *The reply is to something else* (an old one, another layer's, another client's): D is uniform over the multiples of the
  finer step. Then a check passes with probability about 2·tolerance/q: half a percent at 2048 outputs and 16 bits of reply,
  11 % for the coarsest replies that are admitted. All V of a total practically never do. Two tokens exchanged
  within a window leave its sum as it is, and then two checks of a token have to pass. Where both have the same variant, with
  probability 1/8, the two D are opposite, so that both pass or neither: p/8 + p² at most, where p is that of one check.

**For how long.** Vectors serve until the first lie that they catch (`check_store`). As long as none was caught, the worker
sees what it would see for any other r. So its first lie of the first two kinds does not depend on r either, whatever was
tried before, and passes with probability MISSED at most. That bounds a worker's chance for the whole life of the vectors.

**Not caught** are errors below the tolerance; single ones up to `result_tolerance`, 1.7 times that, may pass. `inspect`
shows that amount in standard deviations of the noise of decryption; at 2048 outputs it is some hundreds of them, a tenth of
a typical result or more. So a worker can, without risk, add a bias of some percent to single results of its choice. Only
the Euclidean norm of all that it adds to a token is held near that of the noise; a bias that all n tokens of a window share
is held to 1/√n of that. (Factors ±3 and ±4 would make the amount 1.3 times smaller beside the noise, and the tolerance 2.2
times larger beside q: replies would need a bit more to be verified at all.) Errors between the tolerance of a token and that
of its window, made to cancel in the token, are seen by the token's check alone: with probability 1/2 at least.
`LinearParameters` whose tolerance comes near q cannot be checked and are refused.

**Honest workers** are never refused for what W is like, within what is said above: rows of zeros, rows that a power of two
divides, and rows that are multiples of each other are accounted for when r is drawn.

**Old bundles** have OLD_VARIANTS vectors, whose factors were drawn each by itself. The rest holds with 2^-8 in place of
MISSED and 2^-k of the product, but for what is said of q/2: one output in 256 has even factors in all of them, and can be
changed by q/2 for as long as the bundle lives. Opening them warns. Older ones than those with `Roundings` are checked as if
every row had an odd weight and none were a multiple of another.

The check looks at ciphertext words, replies and r, and at nothing decrypted. What the client does after it tells nothing
about data, adapter or encryption secrets, only about r.
"""

from __future__ import annotations

import threading

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hecompile.errors import VerificationError
from hecompile.he.check_tolerances import GROUP, check_count
from hecompile.he.check_vectors import TOKEN_VARIANTS, Checks
from hecompile.he.parameters import LOG_Q, LinearParameters
from hecompile.he.random.sampling import SecretRandom


class _Sums:
    """Add up sums mod q from the parts of several threads.

    Attributes:
        window: tokens of a window, a power of two.
        sums: int32 `[T, checks]`, of each token by its variant.
        total_sums: int32 `[windows, variants, checks]`, of all tokens of a window together by every variant.
    """

    def __init__(self, tokens: int, window: int, variants: int, checks: int) -> None:
        self.window = window
        self.sums = np.zeros((tokens, checks), dtype=np.int32)
        self.total_sums = np.zeros((-(-tokens // window), variants, checks), dtype=np.int32)
        self._lock = threading.Lock()

    def add(self, part: NDArray[np.int32], total_part: NDArray[np.int32], piece: slice) -> None:
        """Add the sums over some of the features for a piece of the tokens.

        Args:
            part: int32 `[checks, tokens, SUM_LANES]`, the sum in the first lane.
            total_part: int32 `[windows, variants · checks, SUM_LANES]`, likewise.
            piece: which tokens.
        """
        windows = slice(piece.start // self.window, -(-piece.stop // self.window))
        with self._lock:
            self.sums[piece] += part[..., 0].T
            if total_part.size:
                totals = self.total_sums[windows]
                totals += total_part[..., 0].reshape(totals.shape)


class Expectation(_Sums):
    """Hold what the reply to one request must sum to: Σ_j v_j·b'_j.

    Attributes:
        checks: of the circuit.
        drawn: int64 `[TOKEN_VARIANTS]`, the distinct variants that check single tokens of this request.
        variants: int64 `[T]`, which of them checks each token.
    """

    def __init__(self, checks: Checks, window: int, drawn: NDArray[np.int64], variants: NDArray[np.int64]) -> None:
        super().__init__(len(variants), window, checks.variants, check_count(checks.outputs))
        self.checks, self.drawn, self.variants = checks, drawn, variants

    @classmethod
    def draw(cls, checks: Checks, linear: LinearParameters, tokens: int, random: SecretRandom) -> Expectation:
        """Start a request of `tokens` tokens with freshly drawn variants."""
        octets = random.below_power_of_two(8, tokens + 1)
        # Neighbours, from any one on: the factors of any eight variants are distributed alike.
        drawn = (octets[tokens] + np.arange(TOKEN_VARIANTS)) % checks.variants
        return cls(checks, checks.window(linear, tokens), drawn, drawn[octets[:tokens] % TOKEN_VARIANTS])

    @classmethod
    def of_ciphertext(
        cls, checks: Checks, linear: LinearParameters, planes: Tensor, random: SecretRandom
    ) -> Expectation:
        """Compute what the reply to a ciphertext that exists must sum to, for vectors that it was not made with.

        Args:
            checks: of the circuit.
            linear: the circuit.
            planes: uint8 `[upload_limbs, T, in_features]`.
            random: of the variants.

        Raises:
            InputError: these are the check vectors of another circuit.
        """
        checks.check_fits(linear)
        result = cls.draw(checks, linear, planes.shape[1], random)
        words = np.zeros(planes.shape[1:], dtype=np.int64)  # [T, in]
        for limb, plane in enumerate(planes.numpy()):
            words |= plane.astype(np.int64) << (LOG_Q - 8 * (linear.upload_limbs - limb))
        images = checks.images.astype(np.int64)  # [variants, checks, in]; sums mod 2^64 are right mod q
        for variant in result.drawn:
            tokens = result.variants == variant
            result.sums[tokens] = (words[tokens] @ images[variant].T).astype(np.int32)
        for window, totals in enumerate(result.total_sums):
            total = words[window * result.window : (window + 1) * result.window].sum(axis=0)  # [in]
            totals[:] = (images @ total).astype(np.int32)
        return result


class Received(_Sums):
    """Hold what a reply sums to: Σ_i r_i·Y'_i, or nothing where there is no expectation to check it by."""

    def __init__(self, expectation: Expectation | None, tokens: int) -> None:
        if expectation is None:
            super().__init__(tokens, 1, 0, 0)
        else:
            super().__init__(tokens, expectation.window, expectation.checks.variants, expectation.sums.shape[1])
        self._expectation = expectation

    def verify(self, linear: LinearParameters) -> None:
        """Verify the reply: |D| ≤ tolerance for the check of every token, and for all checks of the totals of every window.

        Raises:
            VerificationError: a token or a total deviates by more; the message says how many tokens do.
        """
        if self._expectation is None:
            return
        expectation, tokens = self._expectation, len(self.sums)
        checks, starts = expectation.checks, range(0, tokens, self.window)
        counts = [min(self.window, tokens - start) for start in starts]  # the last window may have fewer
        variants, means = expectation.variants, checks.means(linear)
        deviations = _distance(self.sums, expectation.sums, means[variants])  # [T, checks]
        wrong = deviations > checks.tolerances(linear)[variants]
        allowed = np.stack([checks.tolerances_of_total(linear, count) for count in counts])  # [windows, variants, checks]
        means = np.array(counts)[:, None, None] * means
        bad = _distance(self.total_sums, expectation.total_sums, means) > allowed
        if wrong.any() or bad.any():
            count, windows = int(wrong.any(axis=1).sum()), int(bad.any(axis=(1, 2)).sum())
            # The message shows no deviation: a worker could arrange it to spell out some of r for whoever sees the log.
            raise VerificationError(
                f"{count or f'1 or more in {windows} groups of {max(counts)}'} of {tokens} tokens of the reply are not the "
                "product that was asked for: their check sums deviate by more than rounding can explain"
            )


def _distance(one: NDArray[np.int32], other: NDArray[np.int32], means: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return |one - other - means| mod q, centred, which int32 does by itself; means are multiples of 1/2."""
    whole = np.floor(means)
    deviations: NDArray[np.float64] = np.abs((one - other - whole.astype(np.int64)).astype(np.int32) - (means - whole))
    return deviations


def hint_is_right(checks: Checks, coefficients: Tensor, matrix: Tensor) -> bool:
    """Return whether H = W·A mod q, by every variant: H int32 `[out, n]`, A int32 `[in, n]`.

    Nothing is rounded, and every variant looks at all of H: a wrong H passes with probability MISSED at most.
    """
    vectors, images = checks.vectors, checks.images
    for group in range(images.shape[1]):
        rows = slice(group * GROUP, (group + 1) * GROUP)
        left = torch.from_numpy(vectors[:, rows]).double() @ coefficients[rows].double()  # exact: below 2^43
        image = torch.from_numpy(images[:, group]).double()
        right = torch.zeros(left.shape, dtype=torch.int64)
        for place in range(4):  # byte by byte, so that sums are below 2^27 · 2^8 · 2^15 and exact
            digits = ((matrix >> (8 * place)) & 255).double()
            right += (image @ digits).to(torch.int64) << (8 * place)
        if not torch.equal(left.to(torch.int64).to(torch.int32), right.to(torch.int32)):
            return False
    return True
