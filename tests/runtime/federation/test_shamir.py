"""Shares: any threshold of them, and no fewer, give the secret; sums of shares are shares of sums."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hecompile.errors import FederationError, InputError
from hecompile.he.random.sampling import SecretRandom
from hecompile.runtime.federation.protocol import shamir
from hecompile.runtime.federation.protocol.shamir import PRIME

RANDOM = SecretRandom()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), count=st.integers(1, 128), clients=st.integers(1, 5))
def test_any_threshold_of_summed_shares_gives_the_sum(data: st.DataObject, count: int, clients: int) -> None:
    threshold = data.draw(st.integers(1, count))
    limit = PRIME // 2 // clients  # the sum is as large as it may be
    secrets = [np.array(data.draw(st.lists(st.sampled_from([-limit, -1, 0, 1, limit]), min_size=3, max_size=3)), np.int32)
               for _ in range(clients)]  # fmt: skip
    shares = [shamir.share(secret, threshold, count, RANDOM) for secret in secrets]
    holders = data.draw(st.permutations(range(count)))[: data.draw(st.integers(threshold, count))]
    summed = {holder + 1: shamir.add([rows[holder] for rows in shares]) for holder in holders}
    assert np.array_equal(shamir.combine(summed, threshold), np.sum(secrets, axis=0))


def test_fewer_than_the_threshold_say_nothing() -> None:
    """For given t - 1 shares every secret is possible: exactly one polynomial goes through them and through it."""
    threshold, count = 4, 6
    shares = shamir.share(np.array([1234], np.int32), threshold, count, RANDOM)
    seen = {point: shares[point - 1] for point in (2, 3, 5)}
    for other in (-30000, 0, 77):
        matching = dict(seen)
        # The share at point 1 that goes with secret `other`: interpolate through (0, other) and the shares seen.
        rows = np.stack([np.array([other % PRIME]), *(seen[p].astype(np.int64) for p in (2, 3, 5))])
        matching[1] = shamir._interpolate([0, 2, 3, 5], rows, 1).astype(np.uint16)
        assert shamir.combine(matching, threshold) == [other]


def test_shares_of_one_secret_are_uniform() -> None:
    shares = shamir.share(np.zeros(60_000, np.int32), 2, 3, RANDOM)
    for row in shares:
        counts = np.bincount(row.astype(np.int64) * 16 // PRIME, minlength=16)
        statistic = float(((counts - 3750) ** 2 / 3750).sum())
        assert statistic < 60  # chi-square of 15 degrees of freedom: exceeded with probability 2e-7


@settings(max_examples=30, deadline=None)
@given(data=st.data(), threshold=st.integers(2, 20), surplus=st.integers(1, 10))
def test_a_wrong_share_among_more_than_enough_is_noticed(data: st.DataObject, threshold: int, surplus: int) -> None:
    shares = dict(
        enumerate(shamir.share(np.arange(4, dtype=np.int32), threshold, threshold + surplus, RANDOM), start=1)
    )
    liar = data.draw(st.integers(1, threshold + surplus))
    shares[liar] = (shares[liar].astype(np.int64) + data.draw(st.integers(1, PRIME - 1))) % PRIME
    with pytest.raises(FederationError, match="contradict"):
        shamir.combine({k: v.astype(np.uint16) for k, v in shares.items()}, threshold)


def test_known_answer() -> None:
    shares = shamir._share_with(np.array([-5, 7], np.int32), np.array([[1, 65520], [2, 3]]), 3)
    assert shares.tolist() == [[65519, 9], [5, 17], [16, 31]]


def test_impossible_thresholds_and_too_few_shares() -> None:
    for threshold, count in ((0, 3), (4, 3), (2, PRIME)):
        with pytest.raises(InputError):
            shamir.share(np.zeros(1, np.int32), threshold, count, RANDOM)
    with pytest.raises(InputError, match="at most 32760"):
        shamir.share(np.array([PRIME // 2 + 1], np.int32), 1, 1, RANDOM)
    shares = dict(enumerate(shamir.share(np.zeros(2, np.int32), 3, 5, RANDOM), start=1))
    with pytest.raises(FederationError, match="2 shares, but it takes 3"):
        shamir.combine({1: shares[1], 2: shares[2]}, 3)
    with pytest.raises(FederationError, match="no vector of field elements"):
        shamir.combine({**shares, 1: np.full(2, PRIME, np.uint16)}, 3)


def test_uniform_below_a_bound() -> None:
    values = RANDOM.below(PRIME, 100_000)
    assert values.min() >= 0 and values.max() < PRIME and abs(values.mean() / (PRIME / 2) - 1) < 0.01
    assert set(RANDOM.below(3, 1000)) == {0, 1, 2} and RANDOM.below(5, 0).size == 0
