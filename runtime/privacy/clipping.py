"""Clip and sum per-example gradients in grid integers, with a sensitivity that holds exactly, and add noise.

Clipping is joint over all matrices (Abadi et al., arXiv 1607.00133): example i adds g_i · min(1, C / ‖g_i‖₂). On the grid of
step γ that becomes a vector of integers, each cut toward zero, whose exact integer norm is at most ⌊C / γ⌋: so adding or
removing an example moves the sum by at most C in the Euclidean norm, whatever floating point did to its gradient before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hecompile.errors import InputError, NotFiniteError
from hecompile.he.random.sampling import SecretRandom
from hecompile.runtime.privacy.accountant import LARGEST_NOISE, SMALLEST_NOISE
from hecompile.runtime.privacy.noise import SIGMA_GRID, discrete_gaussian


@dataclass(frozen=True)
class Grid:
    """Define a grid of multiples of `step` (in the gradient's unit); `bound` is the clipping norm in steps, below 2^31."""

    step: float
    bound: int

    @staticmethod
    def of(max_grad_norm: float, noise_multiplier: float) -> Grid:
        """Make the grid on which noise of standard deviation noise_multiplier · max_grad_norm is SIGMA_GRID steps.

        A noise multiplier of 0 has a grid of the same kind and no noise. Raises InputError out of range.
        """
        if not (math.isfinite(max_grad_norm) and max_grad_norm > 0):
            raise InputError(f"max_grad_norm is {max_grad_norm}; clipping needs a finite norm above 0")
        check_noise_multiplier(noise_multiplier)
        step = max_grad_norm * (noise_multiplier or 1.0) / SIGMA_GRID
        return Grid(step, math.floor(max_grad_norm / step))


def check_noise_multiplier(noise_multiplier: float) -> None:
    """Raise InputError unless it is 0 or in [SMALLEST_NOISE, LARGEST_NOISE]."""
    if noise_multiplier != 0 and not SMALLEST_NOISE <= noise_multiplier <= LARGEST_NOISE:
        raise InputError(
            f"the noise multiplier {noise_multiplier:g} is outside {SMALLEST_NOISE} … {LARGEST_NOISE:g}: below it promises "
            f"nothing, above it nothing of the gradient is left; change the noise, epsilon or the number of steps"
        )


def clipped_sum(gradients: Mapping[str, Tensor], grid: Grid) -> dict[str, Tensor]:
    """Sum the clipped gradients over the examples, in steps of `grid`.

    Args:
        gradients: per matrix float [E, *shape], the gradient of each of E examples; E may be 0.

    Returns:
        Per matrix int64 [*shape]. Adding or removing an example changes all of them together by at most `grid.bound` in
        the Euclidean norm, exactly.

    Raises:
        NotFiniteError: a gradient is not finite; clipping would make a number of it that protects nobody.
    """
    names = list(gradients)
    shapes = [gradients[name].shape[1:] for name in names]
    flat = torch.cat([gradients[name].flatten(1).double() for name in names], dim=1)  # [E, P]
    if not torch.isfinite(flat).all():
        bad = next(name for name in names if not torch.isfinite(gradients[name]).all())
        raise NotFiniteError(f"the gradient of {bad} is not finite for an example")
    total = torch.zeros(flat.shape[1], dtype=torch.int64)
    for row in flat:
        total += _on_grid(row, grid)
    parts = total.split([shape.numel() for shape in shapes])
    return {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}


def _on_grid(vector: Tensor, grid: Grid) -> Tensor:
    """Clip one example: float64 [P] → int64 [P] of integer norm ≤ grid.bound."""
    steps = vector / grid.step
    norm = float(steps.norm())
    scale = min(1.0, grid.bound / norm) if norm else 1.0
    while True:
        integers = (steps * scale).trunc_().to(torch.int64)
        # Exact: the bound is below 2^31, and float64 is only ever a little above it.
        if int(integers.square().sum()) <= grid.bound**2:
            return integers
        scale *= 1 - 2.0**-40


def add_noise(
    sums: Mapping[str, Tensor], noise_multiplier: float, random: SecretRandom | None = None
) -> dict[str, Tensor]:
    """Add a discrete Gaussian of SIGMA_GRID steps to every element of int64 tensors; none where the multiplier is 0."""
    if noise_multiplier == 0:
        return dict(sums)
    counts = [value.numel() for value in sums.values()]
    noise = torch.from_numpy(discrete_gaussian(sum(counts), random)).split(counts)
    return {name: value + part.view(value.shape) for (name, value), part in zip(sums.items(), noise, strict=True)}


def in_units(sums: Mapping[str, Tensor], grid: Grid, divisor: float = 1.0) -> dict[str, Tensor]:
    """Convert grid integers to float32 in the gradient's unit, divided by `divisor` (the expected batch size)."""
    return {name: (value.double() * (grid.step / divisor)).float() for name, value in sums.items()}
