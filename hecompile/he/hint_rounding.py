"""Bound the noise of hints whose words are rounded, which costs no room that other noise does not take anyway.

A word of H rounded to b bits is H + ε with |ε| ≤ S/2, S = 2^(32 - b). Decryption subtracts ⟨H + ε, s⟩, so ⟨ε, s⟩ is added to
the noise of a result. It is a coefficient of a product with a ternary secret. In Z[X]/(X^N + 1) it has N terms ±ε_j·s_k.
By X^N = X^(N/2) - 1 coefficient k of a product in the ring of the trinomial is, for p the product of polynomials,

    c_k = p_k - p_{N+k} - p_{3N/2+k}              k < N/2          (k + 1) + (N - 1 - k) + max(0, N/2 - 1 - k) terms
    c_k = p_k + p_{N/2+k}                         k ≥ N/2          (k + 1) + (3N/2 - 1 - k) terms

so at most 3N/2 terms, of which none has the same ε_j and s_k twice. Each has |ε_j·s_k| ≤ S/2, and for s_k uniform in
{-1, 0, 1} and ε_j uniform over a step the variance is 2/3 · (S² - 1)/12; the s_k are independent. Rounding looks at public
numbers alone: an attacker learns nothing by it, and the client's masks are as they were.
"""

from __future__ import annotations

from hecompile.he.kernels.ring_shape import HasRing, trinomial

WORD_BITS = 32
FEWEST_BITS = 16

HINT_TERMS = 2304
"""Most terms of a coefficient in any ring of the catalogue: 3/2 · 1536, and 2048."""


def terms(params: HasRing) -> int:
    """Return the most terms of a coefficient of a product in that ring."""
    dimension = params.ring_dim * params.rank
    return dimension * 3 // 2 if trinomial(params) else dimension


def error_bound(bits: int) -> int:
    """Return the largest |⟨ε, s⟩| for words of so many bits: HINT_TERMS · S/2, and 0 where nothing is rounded."""
    return HINT_TERMS << (WORD_BITS - bits - 1) if bits < WORD_BITS else 0


def error_variance(bits: int) -> float:
    """Return the variance of ⟨ε, s⟩ for words of so many bits, HINT_TERMS · 2/3 · (S² - 1)/12: the largest of any ring."""
    return HINT_TERMS * 2 / 3 * (4.0 ** (WORD_BITS - bits) - 1) / 12
