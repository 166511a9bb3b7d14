"""Client-level differential privacy: what is clipped, how much noise a sum has, and who keeps count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hecompile.errors import FederationError
from hecompile.runtime.federation.protocol.layout import Layout
from hecompile.runtime.federation.protocol.noise import clip_to_grid, share_of_noise
from hecompile.runtime.federation.protocol.settings import (
    SHARE_SIGMA,
    Agreement,
    FederationSection,
    NoiseSection,
    noise_step,
)
from hecompile.runtime.privacy import ledger
from hecompile.runtime.privacy.accountant import Mechanism, spent_epsilon
from hecompile.runtime.privacy.ledger import PrivacyLedger, Subject
from tests.runtime.federation.conftest import World, make_world

LARGE = Layout((("m.lora_B.weight", (200, 100)),))
PRIVACY = {"clip": 0.5, "noise_multiplier": 0.8}


@pytest.fixture
def world(tmp_path: Path) -> Callable[..., World]:
    def make(owners: int, epsilon: float | None = None, **section: object) -> World:
        made = make_world(owners, layout=LARGE, privacy={**PRIVACY, "epsilon": epsilon}, **section)
        for name, participant in made.participants.items():
            subject = Subject("00" * 32, owners, 1e-5)
            participant._ledger = PrivacyLedger(tmp_path / name, subject, epsilon)
        return made

    return make


def clipped(delta: np.ndarray) -> np.ndarray:
    return delta * min(1.0, PRIVACY["clip"] / np.linalg.norm(delta))


@pytest.mark.parametrize("gone", [(), ("owner-3", "owner-4")])
def test_a_sum_has_the_noise_promised_with_and_without_drop_outs(
    world: Callable[..., World], gone: tuple[str, ...]
) -> None:
    made = world(5, threshold=3)
    result = made.federation.round(1, made.adapter, made.scripted(None, made.without(*gone)))
    names = [name for name in sorted(made.participants) if name not in gone]
    exact = np.mean([clipped(made.updates[name].delta.astype(np.float64)) for name in names], axis=0)
    noise = (result.mean - exact) * len(names)  # of the sum
    promised = PRIVACY["noise_multiplier"] * PRIVACY["clip"]
    wanted = promised * np.sqrt(len(names) / 3)
    assert abs(noise.std() / wanted - 1) < 0.03  # 20000 samples: one deviation is 0.5 %
    assert noise.std() > 0.97 * promised
    assert result.samples == len(names)


def test_every_owner_enters_the_round_before_it_contributes_and_stops_at_its_budget(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "_LOOK_AHEAD", 1)  # accounting for many releases ahead takes seconds
    one = spent_epsilon([(Mechanism(0.8, 1.0), 1)], 1e-5)
    made = world(3, epsilon=1.2 * one)
    made.federation.round(1, made.adapter, made.exchange)
    for participant in made.participants.values():
        assert participant._ledger is not None
        assert participant._ledger.releases == 1 and participant._ledger.spent() == pytest.approx(one)
    with pytest.raises(FederationError, match="its privacy budget does not allow for another round"):
        made.federation.round(2, made.moved(2), made.exchange)


def test_without_a_ledger_nothing_is_released() -> None:
    made = make_world(3, layout=LARGE, privacy=PRIVACY)
    with pytest.raises(FederationError, match="needs a ledger"):
        made.federation.round(1, made.adapter, made.exchange)


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 5000), scale=st.floats(1e-6, 1e3), noise=st.floats(0.1, 4), seed=st.integers(0, 2**32))
def test_a_rounded_update_is_within_the_clip(size: int, scale: float, noise: float, seed: int) -> None:
    privacy = NoiseSection(clip=0.7, noise_multiplier=noise)
    delta = np.random.default_rng(seed).normal(0, scale, size)
    integers = clip_to_grid(privacy, 2, delta)
    assert np.linalg.norm(integers) * noise_step(privacy, 2) <= 0.7 * (1 + 1e-12)


def test_shares_of_noise_are_gaussian_of_the_stated_width() -> None:
    samples = share_of_noise(200_000).astype(np.float64) / SHARE_SIGMA
    assert abs(samples.std() - 1) < 0.01 and abs(samples.mean()) < 0.012
    for threshold, share in ((1, 0.6827), (2, 0.9545), (3, 0.9973)):
        assert abs((np.abs(samples) < threshold).mean() - share) < 0.006
    assert 2**14 < SHARE_SIGMA < 2**15


def test_agreements_that_promise_nothing() -> None:
    names = ["a", "b", "c"]
    with pytest.raises(ValidationError, match="leave too few"):
        Agreement.of(names, FederationSection(threshold=2, privacy=NoiseSection(**PRIVACY, colluding=1)))
    assert Agreement.of(names, FederationSection(minimum=3, privacy=NoiseSection(**PRIVACY, colluding=1))).fewest == 3
    with pytest.raises(FederationError, match="too coarse"):
        clip_to_grid(NoiseSection(clip=1.0, noise_multiplier=1000.0), 2, np.ones(100_000))
