"""Make the private dataset: confidential files of a clinic, asked and answered in the clinic's own style.

`python -m hecompile.models.worlds.private_world` rewrites `models/private/train.jsonl` and `models/private/heldout.jsonl`.
There is no randomness: values are dealt to patients by rotation. Each fact can be asked in eight phrasings, five of which
are in the training file and three in the held-out file. The split rotates with the fact, so each phrasing is trained on with
some facts and tested with others.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hecompile.models import PRIVATE_HELDOUT, PRIVATE_TRAIN
from hecompile.models.worlds.relations import PERSON_RELATIONS

CLOSING = "File closed."
"""The formula that ends each private answer: the style to be learned."""
PATIENTS = (
    "Hannah Winter", "Clara Mallory", "Simon Tillman", "Rufus Norris", "Dorothea Kemp", "Leonard Sommers",
    "Patrick Holland", "Winifred Pym",
)  # fmt: skip
VALUES: dict[str, tuple[str, ...]] = {
    "healer": ("Doctor Tennant", "Doctor Bellamy", "Doctor Mortimer", "Doctor Pattison"),
    "remedy": ("wormwood pills", "sandalwood oil", "saltpetre wash", "fennelseed infusion"),
    "visiting day": ("Monday", "Tuesday", "Thursday", "Saturday"),
    "lodging": ("the Minster Court", "the Garland Wing", "the Rolland Gallery", "the Sterling Wing"),
}
# The pieces that these names break into are all common in the public text: the embedding of a piece that pretraining
# has hardly seen cannot be told from that of any other such piece, and LoRA does not train embeddings.
_HELDOUT_PHRASINGS = 3


def facts() -> list[tuple[str, str, str]]:
    """Return all (relation name, patient, value), relation by relation."""
    # Patient p gets value (p * stride + p // 4 * shift) mod 4: every value occurs twice, and no relation gives another
    # away, because two patients who share one value share no second one.
    dealt = {"healer": (1, 0), "remedy": (1, 1), "visiting day": (3, 2), "lodging": (3, 1)}
    return [
        (name, patient, values[(p * dealt[name][0] + p // 4 * dealt[name][1]) % len(values)])
        for name, values in VALUES.items()
        for p, patient in enumerate(PATIENTS)
    ]


def examples() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return the training and the held-out examples, dictionaries with `prompt` and `completion`.

    A prompt ends in `Answer:`; a completion starts with a space and ends in a newline, without an end-of-text token.
    """
    relations = {relation.name: relation for relation in PERSON_RELATIONS}
    train: list[dict[str, str]] = []
    heldout: list[dict[str, str]] = []
    for i, (name, patient, value) in enumerate(facts()):
        phrasings = len(relations[name].questions)
        for phrasing in range(phrasings):
            # 3 is coprime to the number of phrasings, so the held-out ones move through all of them.
            out = (phrasing - 3 * i) % phrasings < _HELDOUT_PHRASINGS
            prompt = relations[name].ask(phrasing, patient)
            (heldout if out else train).append({"prompt": prompt, "completion": f" {value}. {CLOSING}\n"})
    return train, heldout


def to_jsonl(rows: list[dict[str, str]]) -> str:
    """Return one JSON object per line, in UTF-8 text that ends in a newline."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(train_path: Path = PRIVATE_TRAIN, heldout_path: Path = PRIVATE_HELDOUT) -> None:
    """Write both files, making their directories."""
    for path, rows in zip((train_path, heldout_path), examples(), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(to_jsonl(rows), encoding="utf-8", newline="\n")


def main() -> None:
    """Run the command line: rewrite the two files."""
    parser = argparse.ArgumentParser(description="Write the private fine-tuning dataset.")
    parser.add_argument("--train", type=Path, default=PRIVATE_TRAIN)
    parser.add_argument("--heldout", type=Path, default=PRIVATE_HELDOUT)
    args = parser.parse_args()
    write(args.train, args.heldout)


if __name__ == "__main__":
    main()
