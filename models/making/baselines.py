"""Measure the count-based models that the tiny Llama has to beat: unigram and bigram with add-k smoothing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_KS = (1.0, 0.1, 0.01, 0.001)


def unigram_loss(train: NDArray[np.int64], heldout: NDArray[np.int64], vocab_size: int) -> float:
    """Return nats per token of `heldout` [n] under add-one smoothed unigram counts of `train` [m].

    The first held-out token is not counted, as a model that predicts the next token does not see it predicted.
    """
    counts = np.bincount(train, minlength=vocab_size).astype(np.float64) + 1.0
    return float(-np.log(counts / counts.sum())[heldout[1:]].mean())


def bigram_loss(train: NDArray[np.int64], heldout: NDArray[np.int64], vocab_size: int) -> float:
    """Return nats per token of `heldout` [n] given the token before it, under add-k smoothed counts of `train` [m].

    k is the one of 1, 0.1, 0.01 and 0.001 that is best on `heldout`, so the baseline is as strong as it can be.
    """
    pairs = train[:-1] * vocab_size + train[1:]
    counts = np.bincount(pairs, minlength=vocab_size * vocab_size).reshape(vocab_size, vocab_size)
    given = counts.sum(axis=1)[heldout[:-1]]  # [n - 1]
    seen = counts[heldout[:-1], heldout[1:]]  # [n - 1]
    return min(float(-np.log((seen + k) / (given + k * vocab_size)).mean()) for k in _KS)
