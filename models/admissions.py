"""A larger private dataset for differential privacy: a clinic's admissions, one line per patient.

`python -m models.admissions` rewrites `models/private/admissions.jsonl` and `models/private/admissions_heldout.jsonl`.

What a wing prescribes is the clinic's rule, the same for all its patients: it can be learned from many without remembering
any. Who treats a patient is that patient's own, drawn at random: it can only be remembered. Half of the lines ask for the
one, half for the other. The held-out file asks for remedies of patients who are not in the training file. """

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from random import Random

from models import ADMISSIONS_HELDOUT, ADMISSIONS_TRAIN
from models.private_world import CLOSING, VALUES, to_jsonl
from models.public_world import person

TRAIN, HELDOUT = 1024, 256
RULE: dict[str, str] = dict(zip(VALUES["lodging"], VALUES["remedy"], strict=True))
"""What each wing prescribes."""
RULE_QUESTIONS = ("Which remedy was given to {e} of {w}?", "What remedy does {e} of {w} take?")
OWN_QUESTIONS = ("Who treats {e} of {w}?", "Which healer looks after {e} of {w}?")


def admissions(count: int, skip: int = 0, seed: int = 0) -> list[dict[str, str]]:
    """`count` lines, dictionaries with `prompt` and `completion`, after the first `skip` of those that `seed` gives.

    Even ones ask by the rule, odd ones for a patient's own healer. No two are about the same patient.
    """
    rng = Random(f"admissions {seed}")  # noqa: S311 (made-up text, nothing secret)
    return list(islice(_lines(rng), skip, skip + count))


def _lines(rng: Random) -> Iterator[dict[str, str]]:
    seen: set[str] = set()
    while True:
        number, name = len(seen), person(rng)
        wing, healer = rng.choice(VALUES["lodging"]), rng.choice(VALUES["healer"])
        phrasing = rng.randrange(2)
        if name in seen:
            continue
        seen.add(name)
        question = (RULE_QUESTIONS, OWN_QUESTIONS)[number % 2][phrasing].format(e=name, w=wing)
        answer = (RULE[wing], healer)[number % 2]
        yield {"prompt": f"Question: {question}\nAnswer:", "completion": f" {answer}. {CLOSING}\n"}


def by_rule(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Of rows from an even `skip` on: those that ask by the rule."""
    return rows[0::2]


def own(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Of rows from an even `skip` on: those that ask for what is a patient's own."""
    return rows[1::2]


def write() -> None:
    """Write both files."""
    ADMISSIONS_TRAIN.write_text(to_jsonl(admissions(TRAIN)), encoding="utf-8", newline="\n")
    heldout = by_rule(admissions(2 * HELDOUT, skip=TRAIN))
    ADMISSIONS_HELDOUT.write_text(to_jsonl(heldout), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    write()
