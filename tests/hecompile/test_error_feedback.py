"""Rounding with error feedback: never outside the range, exact on whole numbers, better where rows correlate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hecompile.approximation import error_feedback
from hecompile.approximation.error_feedback import ErrorFeedback
from tests.support.graphs import gaussian


def correlated(rows: int, columns: int) -> Tensor:
    """Rows with a falling spectrum, as activations have."""
    return (gaussian(rows, columns) * torch.arange(1, columns + 1) ** -1.0) @ gaussian(columns, columns, seed=1)


def loss(samples: Tensor, steps: Tensor, rounded: Tensor) -> float:
    return float((samples @ (steps - rounded).t()).norm())


@pytest.mark.parametrize("columns", [1, 2, 127, 128, 129, 300])
def test_products_with_other_samples_of_the_kind_change_less_than_with_rounding_to_nearest(columns: int) -> None:
    every, steps = correlated(4 * columns + 40, columns), 20 * gaussian(16, columns, seed=2)
    seen, others = every[::2], every[1::2]
    rounded = ErrorFeedback(seen).round(steps, 127)
    assert torch.equal(rounded, rounded.round())
    nearest = steps.round().clamp(-127, 127)
    assert loss(others, steps, rounded) <= loss(others, steps, nearest) * (1.0001 if columns < 3 else 0.8)


def test_whole_numbers_stay_and_what_is_outside_is_clamped() -> None:
    feedback = ErrorFeedback(correlated(50, 8))
    whole = gaussian(5, 8).mul(10).round()
    assert torch.equal(feedback.round(whole, 127), whole)
    assert torch.equal(feedback.round(torch.full((2, 8), 1000.0), 127)[:, 0], torch.full((2,), 127.0))
    assert float(feedback.round(torch.full((2, 8), -1000.0), 127).min()) == -127


def test_without_correlation_it_is_rounding_to_nearest() -> None:
    steps = 9 * gaussian(6, 40)
    for samples in (torch.zeros(3, 40), torch.eye(40), 1e-30 * torch.eye(40), 1e30 * torch.eye(40)):
        assert torch.equal(ErrorFeedback(samples).round(steps, 127), steps.round())


def test_fewer_samples_than_columns_and_one_massive_sample() -> None:
    samples = correlated(5, 64)
    samples[0] *= 1e6
    steps = 20 * gaussian(16, 64, seed=2)
    rounded = ErrorFeedback(samples).round(steps, 127)
    assert bool(torch.isfinite(rounded).all()) and loss(samples, steps, rounded) < loss(samples, steps, steps.round())


def test_wide_matrices_are_cut_and_equal_inputs_give_equal_results(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, steps = correlated(200, 100), 20 * gaussian(8, 100, seed=2)
    assert torch.equal(ErrorFeedback(samples).round(steps, 127), ErrorFeedback(samples).round(steps, 127))
    parts = [ErrorFeedback(samples[:, part]).round(steps[:, part], 127) for part in (slice(50), slice(50, 100))]
    monkeypatch.setattr(error_feedback, "_LARGEST_FACTOR", 64)
    assert torch.equal(ErrorFeedback(samples).round(steps, 127), torch.cat(parts, dim=1))
