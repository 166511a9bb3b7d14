"""Bits of a hint: as few as take at most 0.05 effective bits, not below what was asked for, whole where little is saved."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hecompile.cli.export_options import EncryptionOptions
from hecompile.errors import InputError
from hecompile.he.parameters import LinearParameters
from hecompile.he.weight_norms import measure_norms
from hecompile.plan.circuits import effective_bits
from hecompile.plan.hint_bits import HINT_LOSS, fewest_hint_bits

WEIGHT = torch.randint(-127, 128, (96, 512), generator=torch.Generator().manual_seed(1)).to(torch.int8)
NORMS, _ = measure_norms(WEIGHT)
CREST = 5.0


@pytest.mark.parametrize(("upload", "reply"), [(24, 16), (32, 16), (21, 12)])
def test_one_bit_less_would_take_more(upload: int, reply: int) -> None:
    whole = LinearParameters.from_norms(NORMS, upload, reply)
    chosen = fewest_hint_bits(whole, NORMS, CREST, 6.0)
    before = effective_bits(whole, NORMS, CREST)
    coarser = dataclasses.replace(chosen, hint_bits=chosen.hint_bits - 1)
    assert before - HINT_LOSS <= effective_bits(chosen, NORMS, CREST) < before
    assert effective_bits(coarser, NORMS, CREST) < before - HINT_LOSS
    assert chosen.noise_bound > whole.noise_bound and chosen.room < whole.room


def test_what_was_asked_for_is_kept() -> None:
    whole = LinearParameters.from_norms(NORMS, 24, 16)
    asked = effective_bits(whole, NORMS, CREST) - HINT_LOSS / 50
    free, bound = (fewest_hint_bits(whole, NORMS, CREST, wanted) for wanted in (6.0, asked))
    assert effective_bits(free, NORMS, CREST) < asked <= effective_bits(bound, NORMS, CREST)
    assert free.hint_bits < bound.hint_bits


def test_words_stay_whole_where_none_can_be_spared() -> None:
    exact = LinearParameters.from_norms(NORMS)
    assert fewest_hint_bits(exact, NORMS, CREST, 6.0).hint_bits in range(24, 29)
    nothing = dataclasses.replace(exact, max_l1=1, max_l2=1.0)
    norms = dataclasses.replace(NORMS, max_l1=1, max_l2=1.0, mean_square_l2=1.0)
    assert fewest_hint_bits(nothing, norms, CREST, 6.0).hint_bits == 32


def test_the_option_and_its_old_name() -> None:
    for given in ({"no_hints": True}, {"hints": "computed"}):
        assert EncryptionOptions(**given).hints_option() == "computed"  # type: ignore[arg-type]
    assert EncryptionOptions().hints_option() == "stored"
    both = [({"hints": place, "no_hints": True}, "drop it") for place in ("stored", "fetched")]
    for wrong, message in (({"hints": "none"}, "--hints must be stored"), *both):
        with pytest.raises(InputError, match=message):
            EncryptionOptions(**wrong).hints_option()  # type: ignore[arg-type]
