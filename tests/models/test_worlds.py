"""The public corpus and the private dataset: reproducible, disjoint, and split without leaks."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest

from hecompile.errors import InputError
from hecompile.models import PRIVATE_HELDOUT, PRIVATE_TRAIN
from hecompile.models.worlds.private_world import CLOSING, PATIENTS, VALUES, examples, facts, to_jsonl, write
from hecompile.models.worlds.public_world import DAYS, build_world, documents
from hecompile.models.worlds.relations import PERSON_RELATIONS, TOWN_RELATIONS


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    from hecompile.models.making.pretrain import Recipe

    return documents(Recipe.documents, Recipe.seed)


def test_corpus_is_determined_by_its_seed() -> None:
    assert documents(50, seed=3) == documents(50, seed=3)
    assert documents(50, seed=3) != documents(50, seed=4)
    assert documents(50, seed=3) != documents(50, seed=3, heldout=True)


def test_corpus_needs_a_positive_count() -> None:
    with pytest.raises(InputError, match="not 0"):
        documents(0)


def test_every_relation_has_at_least_six_distinct_phrasings() -> None:
    for relation in PERSON_RELATIONS + TOWN_RELATIONS:
        assert len(set(relation.questions)) == len(relation.questions) >= 6
        assert all("{e}" in question and "{v}" not in question for question in relation.questions)
        assert all("{e}" in statement and "{v}" in statement for statement in relation.statements)


def test_reserved_questions_are_in_the_heldout_part_only(corpus: list[str]) -> None:
    reserved = {
        fact.relation.ask(phrasing, fact.entity)
        for fact in build_world().facts
        for phrasing in range(len(fact.relation.questions))
        if fact.reserved(phrasing)
    }
    text, heldout = "".join(corpus), "".join(documents(400, heldout=True))
    assert len(reserved) > 300
    # A biography never asks, and passing people have names of their own, so no reserved question may occur at all.
    assert not [question for question in reserved if question in text]
    assert sum(question in heldout for question in reserved) > 50


def test_public_corpus_knows_nothing_private(corpus: list[str]) -> None:
    text = "".join(corpus)
    names = {part for patient in PATIENTS for part in patient.split()}
    values = {value for values in VALUES.values() for value in values} - set(DAYS)
    assert [word for word in sorted(names | values | {CLOSING}) if word in text] == []
    assert "Answer: Monday.\n" in text  # the search itself finds what is there


def test_committed_private_files_equal_a_regeneration(tmp_path: Path) -> None:
    write(tmp_path / "a" / "train.jsonl", tmp_path / "a" / "heldout.jsonl")
    assert PRIVATE_TRAIN.read_bytes() == (tmp_path / "a" / "train.jsonl").read_bytes()
    assert PRIVATE_HELDOUT.read_bytes() == (tmp_path / "a" / "heldout.jsonl").read_bytes()


def test_private_split_trains_every_fact_and_every_phrasing_but_no_heldout_prompt() -> None:
    train, heldout = examples()
    assert len(facts()) == 32
    assert (len(train), len(heldout)) == (160, 96)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in heldout}
    relations = {relation.name: relation for relation in PERSON_RELATIONS}
    for rows, per_fact in ((train, 5), (heldout, 3)):
        prompts = {row["prompt"] for row in rows}
        for name, patient, _ in facts():
            assert sum(relations[name].ask(p, patient) in prompts for p in range(8)) == per_fact
        for name in VALUES:
            for phrasing in range(8):
                assert any(relations[name].ask(phrasing, patient) in prompts for patient in PATIENTS)


def test_no_private_value_gives_another_away() -> None:
    of_patient = {patient: {value for _, p, value in facts() if p == patient} for patient in PATIENTS}
    for a, b in combinations(PATIENTS, 2):
        assert len(of_patient[a] & of_patient[b]) <= 1


def test_completions_have_the_private_style_and_rows_survive_json() -> None:
    train, heldout = examples()
    for row in train + heldout:
        assert row["prompt"].endswith("\nAnswer:")
        assert row["completion"].startswith(" ")
        assert row["completion"].endswith(f". {CLOSING}\n")
    assert [json.loads(line) for line in to_jsonl(heldout).splitlines()] == heldout
