"""The admissions: one line per patient, a rule that others follow too, and what is each one's own."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from hecompile.models import ADMISSIONS_HELDOUT, ADMISSIONS_TRAIN
from hecompile.models.worlds import admissions as module
from hecompile.models.worlds.admissions import HELDOUT, RULE, TRAIN, admissions, by_rule, own
from hecompile.models.worlds.public_world import DAYS


def test_committed_files_equal_a_regeneration(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path_factory.mktemp("admissions")
    monkeypatch.setattr(module, "ADMISSIONS_TRAIN", directory / "train")
    monkeypatch.setattr(module, "ADMISSIONS_HELDOUT", directory / "heldout")
    module.write()
    assert ADMISSIONS_TRAIN.read_bytes() == (directory / "train").read_bytes()
    assert ADMISSIONS_HELDOUT.read_bytes() == (directory / "heldout").read_bytes()


def patient(row: dict[str, str]) -> str:
    (name,) = re.findall(
        r"(?:does|be visited|may|remedy of|day of) ([A-Z]\w+ [A-Z]\w+) (?:take|be visited|of)", row["prompt"]
    )
    return name


def test_no_patient_has_two_lines_and_heldout_patients_are_others() -> None:
    rows = [json.loads(line) for line in ADMISSIONS_TRAIN.read_text().splitlines()]
    heldout = [json.loads(line) for line in ADMISSIONS_HELDOUT.read_text().splitlines()]
    assert (len(rows), len(heldout)) == (TRAIN, HELDOUT)
    names = Counter(patient(row) for row in rows + heldout)
    assert len(names) == TRAIN + HELDOUT and max(names.values()) == 1
    assert admissions(10, skip=20) == admissions(30)[20:]
    assert admissions(10) != admissions(10, seed=1)


def test_most_follow_the_rule_and_the_others_follow_nothing() -> None:
    rows = admissions(8000)
    assert len(by_rule(rows)) == 7 * len(own(rows))
    for row in by_rule(rows):
        (house,) = [house for house in RULE if house in row["prompt"]]
        assert row["completion"] == f" {RULE[house]}.\n"
    answers = Counter(row["completion"].strip(" .\n") for row in own(rows))
    assert answers.keys() == set(DAYS)
    # 1000 draws of seven: each within 6 standard deviations of 143.
    assert all(abs(count - 1000 / 7) < 67 for count in answers.values())
    pairs = Counter((house, row["completion"]) for row in own(rows) for house in RULE if house in row["prompt"])
    assert len(pairs) == 14 and min(pairs.values()) > 40
