"""Check that clipping is joint and exact on the grid: what an example can do to a sum is bounded in integers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hecompile.errors import HecompileError, InputError
from hecompile.runtime.privacy.clipping import Grid, add_noise, clipped_sum, in_units
from hecompile.runtime.privacy.noise import SIGMA_GRID, discrete_gaussian

SHAPES = {"a.lora_A": (3, 5), "a.lora_B": (4, 3), "b.lora_A": (2,)}


def gradients(examples: int, seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(examples, *shape, generator=generator) for name, shape in SHAPES.items()}


def norm(sums: dict[str, Tensor]) -> int:
    """Square the Euclidean norm of all of them together, in Python's integers."""
    return sum(int(value) ** 2 for part in sums.values() for value in part.flatten())


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    examples=st.integers(0, 5),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e4, 1e30]),
    clip=st.floats(1e-3, 1e3),
    noise=st.sampled_from([0.0, 0.1, 1.0, 7.3, 1e5]),
)
def test_an_example_more_moves_the_sum_by_the_bound_at_most(
    seed: int, examples: int, scale: float, clip: float, noise: float
) -> None:
    grid = Grid.of(clip, noise)
    every = gradients(examples + 1, seed, scale)
    fewer = {name: value[:-1] for name, value in every.items()}
    with_it, without = clipped_sum(every, grid), clipped_sum(fewer, grid)
    assert norm({name: with_it[name] - without[name] for name in SHAPES}) <= grid.bound**2
    # The noise covers the bound as often as was promised.
    assert grid.bound < 2**31 and SIGMA_GRID / grid.bound >= noise


def test_large_gradients_are_scaled_together_and_small_ones_kept() -> None:
    grid = Grid.of(2.0, 1.0)
    large, small = gradients(1, 1, 50.0), gradients(1, 2, 0.01)
    length = math.sqrt(sum(float(value.double().square().sum()) for value in large.values()))
    clipped = in_units(clipped_sum(large, grid), grid)
    for name, value in clipped.items():
        torch.testing.assert_close(value, large[name][0] * (2.0 / length), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(in_units(clipped_sum(small, grid), grid)[name], small[name][0], rtol=1e-5, atol=1e-7)
    assert norm(clipped_sum(large, grid)) > 0.999999 * grid.bound**2


def test_the_sum_is_exact_in_any_order() -> None:
    grid, every = Grid.of(1.0, 1.3), gradients(6, 3)
    order = [4, 0, 5, 2, 1, 3]
    whole, shuffled = clipped_sum(every, grid), clipped_sum({n: v[order] for n, v in every.items()}, grid)
    halves = [clipped_sum({n: v[part] for n, v in every.items()}, grid) for part in (slice(0, 2), slice(2, 6))]
    for name, value in whole.items():
        assert value.dtype == torch.int64 and value.shape == SHAPES[name]
        assert torch.equal(value, shuffled[name]) and torch.equal(value, halves[0][name] + halves[1][name])


def test_noise_on_a_sum_has_the_promised_size() -> None:
    """10^5 coordinates: the variance within 7 standard deviations, a right sampler fails with probability below 1e-11."""
    count, clip, noise = 100_000, 0.5, 1.7
    grid = Grid.of(clip, noise)
    zeros = {"x": torch.zeros(400, 200, dtype=torch.int64), "y": torch.zeros(20_000, dtype=torch.int64)}
    noisy = in_units(add_noise(zeros, noise), grid, divisor=8.0)
    assert noisy["x"].shape == (400, 200) and noisy["x"].dtype == torch.float32
    values = torch.cat([value.flatten() for value in noisy.values()]).double()
    assert len(values) == count
    assert abs(float(values.square().mean()) / (noise * clip / 8.0) ** 2 - 1) < 7 * math.sqrt(2 / count)
    assert add_noise(zeros, 0.0)["x"] is zeros["x"]
    plain = discrete_gaussian(120_000) * (2.5 / SIGMA_GRID)  # on a grid of the caller's own
    assert abs(float(np.var(plain)) / 2.5**2 - 1) < 7 * math.sqrt(2 / plain.size)


def test_noise_leaves_the_sum_in_it() -> None:
    grid, every = Grid.of(1.0, 0.5), gradients(3, 4)
    exact = clipped_sum(every, grid)
    noisy = add_noise(exact, 0.5)
    difference = torch.cat([(noisy[name] - exact[name]).flatten() for name in SHAPES]).double()
    assert 0 < float(difference.abs().max()) < 8 * SIGMA_GRID


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_refused_by_name(bad: float) -> None:
    every = gradients(3, 5)
    every["a.lora_B"][1, 2, 0] = bad
    with pytest.raises(HecompileError, match=r"gradient of a\.lora_B is not finite for an example"):
        clipped_sum(every, Grid.of(1.0, 1.0))


@pytest.mark.parametrize(
    ("clip", "noise", "message"),
    [(0.0, 1.0, "max_grad_norm is 0"), (math.inf, 1.0, "max_grad_norm is inf"), (1.0, 0.05, r"multiplier 0\.05 is outside"),
     (1.0, 1e6, r"multiplier 1e\+06 is outside"), (1.0, -1.0, "multiplier -1 is outside")],
)  # fmt: skip
def test_a_grid_out_of_range_is_refused(clip: float, noise: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Grid.of(clip, noise)
