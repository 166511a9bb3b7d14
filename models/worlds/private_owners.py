"""Deal the private dataset to several owners, patient by patient, so that no two own the same facts.

`python -m hecompile.models.worlds.private_owners` rewrites `models/private/owners/owner-1.train.jsonl` and so on, for
three owners.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hecompile.models import PRIVATE_TRAIN
from hecompile.models.worlds.private_world import PATIENTS, examples, to_jsonl

OWNERS_DIR = PRIVATE_TRAIN.parent / "owners"


def owner_names(count: int) -> list[str]:
    """Return owner-1 … owner-`count`."""
    return [f"owner-{index + 1}" for index in range(count)]


def split(count: int) -> dict[str, tuple[list[dict[str, str]], list[dict[str, str]]]]:
    """Return training and held-out examples by owner; patient p belongs to owner p mod `count`.

    Raises ValueError for more owners than patients, or none.
    """
    if not 1 <= count <= len(PATIENTS):
        raise ValueError(f"{len(PATIENTS)} patients cannot be dealt to {count} owners")
    train, heldout = examples()
    result = {}
    for index, name in enumerate(owner_names(count)):
        patients = PATIENTS[index::count]
        own = [
            [row for row in rows if any(patient in row["prompt"] for patient in patients)] for rows in (train, heldout)
        ]
        result[name] = (own[0], own[1])
    return result


def write(directory: Path, count: int) -> None:
    """Write `NAME.train.jsonl` and `NAME.heldout.jsonl` for every owner."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, parts in split(count).items():
        for kind, rows in zip(("train", "heldout"), parts, strict=True):
            (directory / f"{name}.{kind}.jsonl").write_text(to_jsonl(rows), encoding="utf-8", newline="\n")


def main() -> None:
    """Run the command line of this module."""
    parser = argparse.ArgumentParser(description="Write the private dataset dealt to several owners.")
    parser.add_argument("--directory", type=Path, default=OWNERS_DIR)
    parser.add_argument("--owners", type=int, default=3)
    options = parser.parse_args()
    write(options.directory, options.owners)


if __name__ == "__main__":
    main()
