"""Compare training runs by their metrics files: how closely one follows another, and where the time of a step went."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hecompile.errors import InputError
from hecompile.runtime.training.metrics import read_metrics

RELATIVE, ABSOLUTE = 0.01, 0.01
"""A loss follows another if it is within 1 %, or within 0.01 nats where that is more."""


@dataclass(frozen=True)
class LossComparison:
    """Compare two loss curves step by step.

    Attributes:
        steps: how many were compared.
        largest_difference: max |a - b| in nats, and the step where it was.
        worst_step: where |a - b| / max(1 % of b, 0.01) is largest.
        worst_ratio: that ratio; at most 1 means that a follows b at every step.
    """

    steps: int
    largest_difference: float
    worst_step: int
    worst_ratio: float

    @property
    def follows(self) -> bool:
        return self.worst_ratio <= 1.0


def tolerance(reference: float) -> float:
    """Return how far a loss may lie from `reference`, in nats."""
    return max(RELATIVE * abs(reference), ABSOLUTE)


def compare_losses(metrics: Path, reference: Path) -> LossComparison:
    """Compare the losses of two metrics files. Raises InputError when they do not hold the same steps."""
    own, other = _losses(metrics), _losses(reference)
    if own.keys() != other.keys() or not own:
        raise InputError(f"{metrics} and {reference} do not hold the same steps ({len(own)} and {len(other)})")
    ratios = {step: abs(own[step] - other[step]) / tolerance(other[step]) for step in own}
    worst = max(ratios, key=lambda step: ratios[step])
    difference = max(abs(own[step] - other[step]) for step in own)
    return LossComparison(len(own), difference, worst, ratios[worst])


def _losses(path: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_metrics(path) if "loss" in record}


@dataclass(frozen=True)
class StepSplit:
    """Split the time of an optimizer step (median over steps, seconds), and count bytes per token on the wire.

    `client_model` is what the other parts leave of `seconds` and `overlapped`, the time that micro-batches in flight
    saved: 0 in sequence.
    """

    seconds: float
    overlapped: float
    client_crypto: float
    client_model: float
    worker: float
    wire: float
    bytes_up_per_token: float
    bytes_down_per_token: float


def step_split(metrics: Path) -> StepSplit:
    """Split a run's steps. Raises InputError for a file without steps."""
    records = [record for record in read_metrics(metrics) if "loss" in record]
    if not records:
        raise InputError(f"{metrics} holds no training step")

    def median(values: Sequence[float]) -> float:
        return statistics.median(values)

    def remainder(record: dict[str, Any]) -> float:
        return record["seconds"] + record["overlapped_seconds"] - sum(record[name] for name in _COSTS)

    tokens = sum(record["tokens"] for record in records)
    return StepSplit(
        seconds=median([record["seconds"] for record in records]),
        overlapped=median([record["overlapped_seconds"] for record in records]),
        client_crypto=median([record["client_crypto_seconds"] for record in records]),
        client_model=median([remainder(record) for record in records]),
        worker=median([record["worker_seconds"] for record in records]),
        wire=median([record["wire_seconds"] for record in records]),
        bytes_up_per_token=sum(record["bytes_up"] for record in records) / tokens,
        bytes_down_per_token=sum(record["bytes_down"] for record in records) / tokens,
    )


_COSTS = ("client_crypto_seconds", "worker_seconds", "wire_seconds")
