"""Products that wrapped: every one is seen, nothing else is, and as rarely missed as is said."""

from __future__ import annotations

import copy
import dataclasses
import math
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hecompile.errors import InputError, SecurityError
from hecompile.he.parameters import LARGEST_GAIN, LinearParameters
from hecompile.he.random.sampling import PublicSeed, SecretRandom
from hecompile.he.weight_norms import WeightNorms, measure_norms
from hecompile.he.wraps import (
    LARGEST_FACTORS,
    MISSED_BITS,
    WrapChecks,
    boundary_share,
    largest_factor,
    read_wrap_checks,
    vector_count,
    write_wrap_checks,
)
from hecompile.plan.hint_bits import fewest_hint_bits

Q, INPUTS, OUTPUTS, TOKENS = 2.0**32, 70, 90, 12
WEIGHT = torch.randint(-127, 128, (OUTPUTS, INPUTS), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
NORMS, _ = measure_norms(WEIGHT)
LINEAR = LinearParameters.from_norms(NORMS, 24, 16, gain=4.0)


def product_of(wraps: Tensor, share: float = 0.4) -> tuple[Tensor, ...]:
    """Return x, what is decrypted of its product less `wraps` [T, out] times q, with noise as predicted, and every scale."""
    generator = torch.Generator().manual_seed(2)
    integers = torch.randn((TOKENS, INPUTS), generator=generator, dtype=torch.float64)
    products = integers @ WEIGHT.double().t()
    size = share * Q / 2 / products.abs().amax(dim=1, keepdim=True)
    noise = torch.randn((TOKENS, OUTPUTS), generator=generator).double()
    noise *= LINEAR.noise_std(WEIGHT.double().square().sum(dim=1).sqrt())
    scale = 10.0 ** torch.linspace(-9, 2, TOKENS, dtype=torch.float64)
    columns, rows = torch.rand(INPUTS, generator=generator) + 0.1, 1e-3 * (torch.rand(OUTPUTS, generator=generator) + 0.1)
    x = (integers * size * scale[:, None] / columns).float()
    decrypted = ((products * size + noise - Q * wraps) * scale[:, None] * rows).float()
    return x, decrypted, scale, columns, rows


def checks_of(largest: int = 64) -> WrapChecks:
    return WrapChecks.draw(WEIGHT, largest, SecretRandom())


@pytest.mark.parametrize("largest", LARGEST_FACTORS)
def test_every_pattern_of_wraps_is_seen_and_nothing_else(largest: int) -> None:
    wraps = torch.zeros((TOKENS, OUTPUTS))
    wraps[1, 5] = 1  # a single output
    wraps[3, [7, 8]] = torch.tensor([1.0, -1.0])
    wraps[4, [7, 8]] = 1
    wraps[6, 0] = -3
    wraps[7] = 1  # every output
    wraps[9, ::2], wraps[9, 1::2] = 2, -1
    wrapped = checks_of(largest).wrapped(*product_of(wraps))
    assert wrapped.nonzero().flatten().tolist() == [1, 3, 4, 6, 7, 9]


def test_half_the_modulus_that_passed_verification_by_luck_is_an_alarm_whatever_the_data() -> None:
    wraps = torch.zeros((TOKENS, OUTPUTS))
    wraps[2, 5], wraps[3, 5] = 0.5, -0.5
    assert checks_of().wrapped(*product_of(wraps)).nonzero().flatten().tolist() == [2, 3]


def test_nothing_is_seen_without_scales_either_and_zeros_are_no_wrap() -> None:
    x = torch.randn((3, INPUTS), generator=torch.Generator().manual_seed(3))
    x[1] = 0
    product, scale = x @ WEIGHT.float().t(), torch.tensor([1e-6, 0.0, 1e-6], dtype=torch.float64)
    assert not checks_of().wrapped(x, product, scale).any()
    product[0, 4] += 1e-6 * Q
    assert checks_of().wrapped(x, product, scale).tolist() == [True, False, False]
    product[2, 4] = math.nan
    assert checks_of().wrapped(x, product, scale).tolist() == [True, False, True]


def test_outputs_without_weights_do_not_count() -> None:
    weight = WEIGHT.clone()
    weight[3] = 0
    rows = torch.ones(OUTPUTS)
    rows[3] = 0
    x = torch.randn((2, INPUTS), generator=torch.Generator().manual_seed(3))
    checks = WrapChecks.draw(weight, 16, SecretRandom())
    scale = torch.full((2,), 1e-6, dtype=torch.float64)
    assert not checks.wrapped(x, (x @ weight.float().t()) * rows, scale, None, rows).any()


def test_one_vector_misses_no_more_than_is_proven() -> None:
    largest = 4
    vectors = np.concatenate([checks_of(largest)._vectors.numpy() for _ in range(60)]).astype(np.int64)  # [1200, out]
    assert set(np.abs(vectors).flatten()) == {1, 2, 3, 4} and abs(vectors.mean()) < 0.05
    for pattern in ((1, 1), (1, -1), (1, 2), (2, -3), (1, 1, 1), (1,) * OUTPUTS):
        missed = float((vectors[:, : len(pattern)] @ np.array(pattern) == 0).mean())
        assert missed <= 1 / (2 * largest) + 0.04, pattern  # 4 standard deviations
    assert not (vectors == 0).any()  # so that a single output is never missed
    for size in LARGEST_FACTORS:
        assert size ** -vector_count(size) <= 2**-MISSED_BITS < size ** -(vector_count(size) - 1)


def test_factors_are_as_large_as_noise_and_verification_leave_room_for() -> None:
    assert largest_factor(LINEAR, NORMS) == 64
    assert largest_factor(LinearParameters.from_norms(NORMS, 16, 16, gain=4.0), NORMS) is None
    wide = WeightNorms(2048, 2048, max_l1=2**16, max_l2=3000.0, mean_square_l2=9e6)
    for up, down, chosen in ((32, 24, 64), (24, 24, 16), (24, 16, 16)):
        assert largest_factor(LinearParameters.from_norms(wide, up, down), wide) == chosen
    checks = checks_of(64)
    images, factors = checks._images.double(), checks._vectors.double()
    of_words = torch.linalg.vector_norm(images, dim=1) * LinearParameters.from_norms(NORMS, 24, 24).noise_std(1.0)
    of_replies = torch.linalg.vector_norm(factors, dim=1) * LINEAR.noise_std(0.0)
    assert bool((8 * torch.hypot(of_words, of_replies) <= Q / 2).all())
    assert bool((images.square().sum(dim=1) <= 2 * (65 * 129 / 6) * WEIGHT.double().square().sum()).all())
    assert 0 < boundary_share(LINEAR) < 0.01


def test_hints_are_not_rounded_so_that_a_wrap_could_hide_in_the_noise() -> None:
    norms = WeightNorms(1024, 8192, max_l1=2**15, max_l2=590.37, mean_square_l2=590.37**2)
    linear = LinearParameters.from_norms(norms, 20, 16, gain=2.0)
    chosen = fewest_hint_bits(linear, norms, 4.0, 4.0)
    assert largest_factor(linear, norms) == largest_factor(chosen, norms) == 4
    proven = fewest_hint_bits(linear.proven, norms, 4.0, 4.0)
    assert proven.hint_bits < chosen.hint_bits
    assert largest_factor(dataclasses.replace(linear, hint_bits=proven.hint_bits), norms) is None


def test_secrets_are_drawn_from_secret_randomness_and_kept() -> None:
    for random in (PublicSeed.draw().stream("checks"), None):
        with pytest.raises(SecurityError, match="SecretRandom"):
            WrapChecks.draw(WEIGHT, 64, random)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="int8 or int16"):
        WrapChecks.draw(WEIGHT.float(), 64, SecretRandom())
    with pytest.raises(SecurityError, match="copied"):
        copy.copy(checks_of())


def test_a_file_holds_what_was_drawn_and_damage_is_refused(tmp_path: Path) -> None:
    path, checks, wraps = tmp_path / "wraps" / "c.npy", checks_of(), torch.zeros((TOKENS, OUTPUTS))
    write_wrap_checks(path, checks)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    wraps[2, 2] = 1
    read = read_wrap_checks(path, LINEAR)
    assert read.count == checks.count and np.array_equal(read.pack(), checks.pack())
    assert read.wrapped(*product_of(wraps)).nonzero().flatten().tolist() == [2]
    np.save(path, checks.pack()[:-1])
    with pytest.raises(InputError, match=r"c\.npy: .* do not fit 70 inputs and 90 outputs: export again"):
        read_wrap_checks(path, LINEAR)
    packed = checks.pack()
    packed[-1] = 0
    np.save(path, packed)
    with pytest.raises(InputError, match=r"c\.npy: .* damaged: export again"):
        read_wrap_checks(path, LINEAR)
    with pytest.raises(InputError, match="export again"):
        read_wrap_checks(tmp_path / "none.npy", LINEAR)


def test_a_gain_lengthens_tokens_and_proves_nothing() -> None:
    proven = LINEAR.proven
    assert proven.gain == 1 and proven.proven is proven
    assert LINEAR.norm_bound == pytest.approx(4 * proven.norm_bound)
    assert (LINEAR.room, LINEAR.input_bound, LINEAR.noise_bound) == (proven.room, proven.input_bound, proven.noise_bound)
    tiny = LinearParameters(4, 4, max_l1=2, max_l2=1.0, gain=LARGEST_GAIN)
    assert tiny.norm_bound == tiny.proven.norm_bound < 2**31
    for gain in (0.5, 100.0, math.nan):
        with pytest.raises(InputError, match=r"gain of a bound must be in \[1, 64\]"):
            LinearParameters.from_norms(NORMS, 24, 16, gain=gain)
