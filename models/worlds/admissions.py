"""Make a larger private dataset for differential privacy: a clinic's admissions, one line per patient.

`python -m hecompile.models.worlds.admissions` rewrites `models/private/admissions.jsonl` and
`models/private/admissions_heldout.jsonl`.

The remedy of a house is the clinic's rule, equal for all its patients: it can be learned from many without remembering any.
The day when a patient may be visited is that patient's own, drawn at random: it can only be remembered. One line in eight
asks for it. The held-out file asks for remedies of patients who are not in the training file.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from random import Random

from hecompile.models import ADMISSIONS_HELDOUT, ADMISSIONS_TRAIN
from hecompile.models.worlds.private_world import to_jsonl
from hecompile.models.worlds.public_world import DAYS, person

TRAIN, HELDOUT, EVERY = 2048, 256, 8
"""Lines of the two files, and the distance between lines that ask for a patient's own day."""
RULE: dict[str, str] = {"the Green Fox": "mint tea", "the Silver Heron": "willow oil"}
"""House → remedy that it prescribes. Names, remedies and days are words of the public text; their pairs are not in it."""
RULE_QUESTIONS = ("What remedy does {e} take at {h}?", "Name the remedy of {e} of {h}.")
OWN_QUESTIONS = ("When may {e} be visited at {h}?", "Name the visiting day of {e} of {h}.")


def admissions(count: int, skip: int = 0, seed: int = 0) -> list[dict[str, str]]:
    """Return `count` lines, dictionaries with `prompt` and `completion`, after the first `skip` that `seed` gives.

    Every eighth asks for a patient's own day, the others by the rule. No two are about one patient.
    """
    rng = Random(f"admissions {seed}")  # noqa: S311 (made-up text, nothing secret)
    return list(islice(_lines(rng), skip, skip + count))


def _lines(rng: Random) -> Iterator[dict[str, str]]:
    seen: set[str] = set()
    while True:
        number, name = len(seen), person(rng)
        house, day = rng.choice(list(RULE)), rng.choice(DAYS)
        phrasing = rng.randrange(2)
        if name in seen:
            continue
        seen.add(name)
        mine = number % EVERY == EVERY - 1
        question = (OWN_QUESTIONS if mine else RULE_QUESTIONS)[phrasing].format(e=name, h=house)
        answer = day if mine else RULE[house]
        yield {"prompt": f"Question: {question}\nAnswer:", "completion": f" {answer}.\n"}


def by_rule(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Select the rows that ask by the rule."""
    return [row for row in rows if not _is_own(row)]


def own(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Select the rows that ask for a patient's own day."""
    return [row for row in rows if _is_own(row)]


def _is_own(row: dict[str, str]) -> bool:
    return row["completion"].strip(" .\n") in DAYS


def write() -> None:
    """Write both files."""
    ADMISSIONS_TRAIN.write_text(to_jsonl(admissions(TRAIN)), encoding="utf-8", newline="\n")
    heldout = by_rule(admissions(2 * HELDOUT, skip=TRAIN))[:HELDOUT]
    ADMISSIONS_HELDOUT.write_text(to_jsonl(heldout), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    write()
