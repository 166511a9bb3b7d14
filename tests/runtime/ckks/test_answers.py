"""Complete prompts under CKKS: which tokens end an answer."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hecompile.runtime.ckks.answers import complete
from tests.support.training import make_tokenizer

FIRST, SECOND = 100, 101


def logits(tokens: np.ndarray, progress: Callable[..., None]) -> np.ndarray:
    """Make FIRST follow the prompt of one letter, and SECOND everything after."""
    found = np.zeros((*tokens.shape, 259))
    found[:, :2, FIRST] = found[:, 2:, SECOND] = 1.0
    return found


@pytest.mark.parametrize(("ends", "written"), [((), 3), ((SECOND,), 1), ((7, FIRST), 0)])
def test_every_token_of_the_bundle_ends_an_answer(ends: tuple[int, ...], written: int) -> None:
    plan = SimpleNamespace(sequence_length=8, last_only=False)
    tokenizer = make_tokenizer()
    session: Any = SimpleNamespace(plan=plan, tokenizer=tokenizer, answer_ends=frozenset(ends), logits=logits)
    assert len(tokenizer("a")["input_ids"]) == 2
    (answer,) = complete(session, ["a"], 3)
    assert answer == tokenizer.decode([FIRST, SECOND, SECOND][:written])
