"""The attacks, on scores whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks.privacy.membership import attack, losses, most_advantage
from hecompile.runtime.model.data import load_examples
from tests.support.training import BUCKETS, RECORDS, make_model, make_tokenizer, write_jsonl


def test_scores_that_tell_everything_nothing_and_half() -> None:
    random = np.random.default_rng(0)
    members, others = random.uniform(0, 1, 2000), random.uniform(0, 1, 2000)
    everything = attack(members, others + 2)
    assert everything.advantage > 0.99 and everything.auc == 1.0
    nothing = attack(members, others)
    assert abs(nothing.advantage) < 5 * nothing.error and abs(nothing.auc - 0.5) < 0.05
    # Half of the members score lower than anybody else: advantage one half, area three quarters.
    half = attack(np.where(random.uniform(size=2000) < 0.5, -1.0, members), others)
    assert half.advantage == pytest.approx(0.5, abs=0.06) and half.auc == pytest.approx(0.75, abs=0.04)
    assert attack(others + 2, members).advantage < 0.01, "high scores are not called members"


def test_an_attack_is_not_judged_on_what_its_threshold_was_chosen_from() -> None:
    random = np.random.default_rng(1)
    found = [attack(random.normal(size=20), random.normal(size=20)).advantage for _ in range(300)]
    assert abs(float(np.mean(found))) < 0.06  # the best threshold on the same 40 scores would seem to gain 0.25


def test_the_bound_is_that_of_a_randomised_response() -> None:
    assert most_advantage(math.inf, 1e-5) == 1.0
    assert most_advantage(0.0, 0.0) == 0.0
    truth = math.exp(1.0) / (1 + math.exp(1.0))  # answering truly with this probability is 1-private
    assert most_advantage(1.0, 0.0) == pytest.approx(truth - (1 - truth))


def test_losses_are_each_examples_own(tmp_path: object) -> None:
    model = make_model()
    examples = load_examples(write_jsonl(tmp_path / "x.jsonl", RECORDS), make_tokenizer(), BUCKETS)  # type: ignore[operator]
    found = losses(model, examples, 0)
    assert found.shape == (len(RECORDS),)
    model.eval()
    for example, loss in zip(examples.examples, found, strict=True):
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            logits = model(ids, torch.ones_like(ids)).logits[0, :-1]
        expected = cross_entropy(logits, torch.tensor(example.labels)[1:], ignore_index=-100)
        assert loss == pytest.approx(float(expected), rel=1e-4)
