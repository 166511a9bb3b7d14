"""Infer membership: who can tell, from an adapter, which examples it was trained on?

The attacker holds the adapter and candidate examples, half of which were in the training file, and calls an example a member
where a score is low. The score is its loss (Yeom et al., arXiv 1709.01604), or its loss less that by a reference model
trained on other examples of the same kind (Watson et al., arXiv 2111.08440). Advantage is the true positive rate less the
false positive rate; (ε, δ)-differential privacy bounds it by (e^ε - 1 + 2δ) / (e^ε + 1) for every attack (Humphries et al.,
arXiv 2010.12112, theorem 3.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray

from hecompile.runtime.model.adapter import AdapterModel
from hecompile.runtime.model.data import Examples, PadToBucket
from hecompile.runtime.model.evaluation import inference
from hecompile.runtime.model.head import scored_positions, scored_targets


@dataclass(frozen=True)
class Attack:
    """Say how well scores tell members from others.

    advantage: on one half of the examples, of the threshold that is best on the other half; the mean of both ways.
    auc: the probability that a member scores lower than another.
    error: about the standard deviation of both, for scores that tell nothing.
    """

    advantage: float
    auc: float
    error: float


def losses(model: AdapterModel, examples: Examples, pad_token_id: int) -> NDArray[np.float64]:
    """Return the mean cross entropy in nats over each example's own labels: float64 [N]."""
    collate, means = PadToBucket(model.sequence_buckets, pad_token_id), []
    with inference(model):
        for start in range(0, len(examples), model.batch_size):
            rows = range(start, min(start + model.batch_size, len(examples)))
            batch: dict[str, Any] = collate([examples[row] for row in rows])
            labels = batch.pop("labels")
            scored = scored_positions(labels)  # [B, S]
            logits = model(**batch, logits_to_keep=scored).logits  # [n, V]
            assert logits is not None
            each = F.cross_entropy(logits, scored_targets(labels), reduction="none")  # [n]
            means += [float(part.mean()) for part in each.split(scored.sum(dim=1).tolist())]
    return np.array(means)


def attack(members: NDArray[np.float64], others: NDArray[np.float64]) -> Attack:
    """Attack by scores of members and of as many others; low means member."""
    halves = [(members[part::2], others[part::2]) for part in (0, 1)]
    gains = []
    for known, unknown in (halves, halves[::-1]):
        threshold = _best_threshold(*known)
        gains.append(float((unknown[0] <= threshold).mean() - (unknown[1] <= threshold).mean()))
    below = (members[:, None] < others[None]).mean() + 0.5 * (members[:, None] == others[None]).mean()
    # For a difference of two rates near one half, each over n examples; for the Mann-Whitney statistic it is √(1 / 6n).
    return Attack(sum(gains) / 2, float(below), math.sqrt(0.5 / len(members)))


def _best_threshold(members: NDArray[np.float64], others: NDArray[np.float64]) -> float:
    candidates = np.sort(np.concatenate([members, others]))
    gains = [(members <= at).mean() - (others <= at).mean() for at in candidates]
    return float(candidates[int(np.argmax(gains))])


def most_advantage(epsilon: float, delta: float) -> float:
    """Return the bound on every attack's advantage; 1 for an infinite ε."""
    return 1.0 if math.isinf(epsilon) else (math.expm1(epsilon) + 2 * delta) / (math.exp(epsilon) + 1)
