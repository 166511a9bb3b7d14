"""The benchmark of training curves: steps outside of the tolerance are found, counted and shown beside those of bfloat16."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.training.curves import BFLOAT16, ENCRYPTED, HEADINGS, Curve, outside_table

PLAINTEXT = {1: 4.0, 2: 2.0, 3: 0.5}
CURVE = Curve(1, ENCRYPTED, {1: 4.039, 2: 1.97, 3: 0.505}, PLAINTEXT, 0.51, 0.5)


def test_a_step_is_outside_where_it_leaves_one_percent_and_a_hundredth_of_a_nat() -> None:
    assert CURVE.differences == pytest.approx({1: 0.039, 2: -0.03, 3: 0.005})
    assert CURVE.ratios == pytest.approx({1: 0.975, 2: 1.5, 3: 0.5})
    assert CURVE.outside == [2]
    assert dict(zip(HEADINGS, CURVE.row(), strict=True)) == {
        "run": ENCRYPTED, "seed": 1, "steps": 3, "loss, plaintext": "4.000 → 0.500", "outside": 1, "largest, nats": "0.0390",
        "worst": "1.50 (step 2)", "held-out": "0.5100 / 0.5000",
    }  # fmt: skip


def test_steps_outside_are_shown_with_what_bfloat16_does_there() -> None:
    other = replace(CURVE, name=BFLOAT16, losses={1: 4.0, 2: 2.025, 3: 0.5})
    assert outside_table([CURVE, other]).splitlines()[2:] == ["| 1 | 2 | 2.0000 | -0.0300 | 1.50 | +0.0250 |"]
    assert outside_table([replace(CURVE, losses=PLAINTEXT), other]) == "No step of an encrypted run leaves the tolerance."
