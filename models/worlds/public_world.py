"""Generate a public text corpus about a made-up world from a seed: prose, stories, sums, and questions with answers.

    python -m hecompile.models.worlds.public_world DIRECTORY --documents 4000      # train.jsonl and heldout.jsonl

Two kinds of fact occur. Facts of the *fixed* world (towns and people that recur through the corpus) must be remembered.
Facts of *passing* people are stated in a passage, or answered once, and then asked for again in another phrasing: they
are inferable in context and teach that paraphrases of a question have the same answer.

A tenth of the (fact, phrasing) pairs of the fixed world is reserved for the held-out part and never occurs in training.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from hecompile.errors import InputError
from hecompile.models.worlds.relations import PERSON_RELATIONS, TOWN_RELATIONS, Relation

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
TRADES = (
    "mending clocks", "baking bread", "weaving cloth", "shoeing horses", "keeping bees", "carving oars",
    "printing books", "brewing ale", "cutting stone", "dyeing wool", "mending nets", "blowing glass",
)  # fmt: skip
GOODS = ("salt", "honey", "candles", "rope", "barley", "plums", "lamps", "paper", "tin cups", "felt hats", "smoked eel")
HERBS = ("willow", "nettle", "mint", "clover", "thistle", "fennel", "poppy", "sage", "ginger", "hazel")
PREPARATIONS = ("tea", "syrup", "drops", "powder", "oil", "salve", "tonic")
INN_COLOURS = ("Copper", "Silver", "Golden", "Green", "Blue", "Red", "White", "Black")
INN_SIGNS = ("Heron", "Anchor", "Lantern", "Wheel", "Fox", "Barrel", "Stag", "Rose")
ONSETS = ("b", "br", "c", "d", "f", "g", "gr", "h", "k", "l", "m", "n", "p", "r", "s", "st", "t", "tr", "v", "w")
VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "oo")
CODAS = ("l", "n", "r", "s", "m", "t", "d", "ll", "nd", "rd", "th", "ck")
FIRST_NAME_ENDINGS = ("a", "o", "in", "el", "ia", "en", "is", "or", "as", "ette", "mund", "bert")
SURNAME_ENDINGS = ("man", "ley", "son", "well", "er", "ing", "wood", "smith", "all", "ard", "cott", "worth")
TOWN_ENDINGS = ("ford", "ham", "wick", "dale", "mere", "by", "port", "stead", "ton", "field")


@dataclass(frozen=True)
class Fact:
    """State that `relation` holds between `entity` and `value`."""

    relation: Relation
    entity: str
    value: str

    def reserved(self, phrasing: int) -> bool:
        """Tell whether question number `phrasing` on this fact belongs to the held-out part only (one pair in ten)."""
        digest = hashlib.sha256(f"{self.relation.name}|{self.entity}|{phrasing}".encode()).digest()
        return digest[0] % 10 == 0

    def answered(self, phrasing: int) -> str:
        """Return question number `phrasing` with its answer, two lines."""
        return f"{self.relation.ask(phrasing, self.entity)} {self.value}.\n"


def _word(rng: Random, endings: tuple[str, ...]) -> str:
    """Return a capitalised pronounceable word of a drawn syllable and one of `endings`."""
    return (rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) + rng.choice(endings)).capitalize()


def person(rng: Random) -> str:
    return f"{_word(rng, FIRST_NAME_ENDINGS)} {_word(rng, SURNAME_ENDINGS)}"


def _healer(rng: Random, titles: tuple[str, ...]) -> str:
    return f"{rng.choice(titles)} {_word(rng, SURNAME_ENDINGS)}"


def _value(rng: Random, relation: Relation, healers: list[str], towns: list[str]) -> str:
    draw: dict[str, Callable[[], str]] = {
        "healer": lambda: rng.choice(healers),
        "remedy": lambda: f"{rng.choice(HERBS)} {rng.choice(PREPARATIONS)}",
        "visiting day": lambda: rng.choice(DAYS),
        "lodging": lambda: f"the {rng.choice(INN_COLOURS)} {rng.choice(INN_SIGNS)}",
        "trade": lambda: rng.choice(TRADES),
        "home": lambda: rng.choice(towns),
        "river": lambda: f"the {_word(rng, FIRST_NAME_ENDINGS)}",
        "mayor": lambda: person(rng),
        "market day": lambda: rng.choice(DAYS),
        "good": lambda: rng.choice(GOODS),
    }
    return draw[relation.name]()


@dataclass(frozen=True)
class World:
    """Hold the fixed world: all facts, grouped by entity, and the names that passing people draw on."""

    facts_by_entity: tuple[tuple[Fact, ...], ...]
    healers: list[str]
    towns: list[str]

    @property
    def facts(self) -> list[Fact]:
        """Return all facts of the fixed world, in the order of their entities."""
        return [fact for facts in self.facts_by_entity for fact in facts]


def build_world(seed: int = 0, towns: int = 40, people: int = 120, healers: int = 24) -> World:
    """Return the fixed world of `seed`: `towns` towns and `people` people with one fact per relation each."""
    rng = Random(f"world {seed}")  # noqa: S311 (made-up text, nothing secret)
    town_names = [_word(rng, TOWN_ENDINGS) for _ in range(towns)]
    healer_names = [_healer(rng, ("Doctor", "Mother", "Brother")) for _ in range(healers)]
    groups = [
        tuple(Fact(relation, entity, _value(rng, relation, healer_names, town_names)) for relation in relations)
        for entity, relations in [
            *((name, TOWN_RELATIONS) for name in dict.fromkeys(town_names)),
            *((person(rng), PERSON_RELATIONS) for _ in range(people)),
        ]
    ]
    return World(tuple(groups), healer_names, town_names)


def _recall(rng: Random, world: World, heldout: bool) -> str:
    """Ask about facts of the fixed world, without context; the held-out part asks reserved pairs only."""
    facts = world.facts
    lines: list[str] = []
    wanted = rng.randint(2, 5)
    while len(lines) < wanted:
        fact = rng.choice(facts)
        phrasing = rng.randrange(len(fact.relation.questions))
        if fact.reserved(phrasing) == heldout:
            lines.append(fact.answered(phrasing))
    return "".join(lines)


def _biography(rng: Random, world: World) -> str:
    facts = list(rng.choice(world.facts_by_entity))
    rng.shuffle(facts)
    return _stated(rng, facts[: rng.randint(2, 4)])


def _stated(rng: Random, facts: list[Fact]) -> str:
    sentences = [f.relation.state(rng.randrange(len(f.relation.statements)), f.entity, f.value) for f in facts]
    return " ".join(sentences) + "\n"


def _passing_facts(rng: Random, world: World, count: int) -> list[Fact]:
    """Draw `count` different facts on two people whose names are made up for this document."""
    healers = [_healer(rng, ("Doctor", "Mother", "Brother", "Sister")) for _ in range(2)]
    pairs = [(entity, relation) for entity in (person(rng), person(rng)) for relation in PERSON_RELATIONS]
    return [
        Fact(relation, entity, _value(rng, relation, healers, world.towns))
        for entity, relation in rng.sample(pairs, count)
    ]


def _passage(rng: Random, world: World) -> str:
    """Write a passage about passing people, then questions on it."""
    facts = _passing_facts(rng, world, rng.randint(2, 4))
    questioned = rng.sample(facts, rng.randint(1, 2))
    return _stated(rng, facts) + "".join(f.answered(rng.randrange(len(f.relation.questions))) for f in questioned)


def _paraphrases(rng: Random, world: World) -> str:
    """Ask about passing people, each fact twice in different phrasings."""
    facts = _passing_facts(rng, world, 2)
    phrasings = [rng.sample(range(len(f.relation.questions)), 2) for f in facts]
    first = [f.answered(p[0]) for f, p in zip(facts, phrasings, strict=True)]
    second = [f.answered(p[1]) for f, p in zip(facts, phrasings, strict=True)]
    rng.shuffle(second)
    return "".join(first + second)


def _sum(rng: Random, world: World) -> str:
    """Write a price or a simple sum; both numbers stay under thirteen so that the table can be learned."""
    del world
    price, count, good = rng.randint(2, 12), rng.randint(2, 12), rng.choice(GOODS)
    buyer = _word(rng, FIRST_NAME_ENDINGS)
    return rng.choice(
        (
            f"Question: What is {price} plus {count}?\nAnswer: {price + count}.\n",
            f"Question: What is {price} times {count}?\nAnswer: {price * count}.\n",
            f"A load of {good} costs {price} pence, so {count} loads cost {price * count} pence.\n",
            f"{buyer} had {price} pence and earned {count}. That makes {price + count} pence.\n",
        )
    )


def _story(rng: Random, world: World) -> str:
    """Write a short narrative whose last sentence follows from the first ones."""
    hero, town, good, day = person(rng), rng.choice(world.towns), rng.choice(GOODS), rng.choice(DAYS)
    opening = rng.choice(
        (
            f"On {day} {hero} walked to {town} to buy {good}.",
            f"{hero} needed {good} and set out for {town} on {day}.",
            f"There was no {good} left, so on {day} {hero} rode to {town}.",
        )
    )
    turn, ending = rng.choice(
        (
            ("The stalls were closed.", f"{hero} came home from {town} without {good}."),
            ("The stalls were full.", f"{hero} came home from {town} with {good}."),
            ("It rained all the way.", f"{hero} came home from {town} wet and tired."),
            ("The road was dry.", f"{hero} came home from {town} before dark."),
        )
    )
    return f"{opening} {turn} {ending}\n"


# (maker, weight): questions make up most of the text, because that is what the model is tested on.
_MAKERS: tuple[tuple[Callable[[Random, World], str], int], ...] = (
    (lambda rng, world: _recall(rng, world, heldout=False), 40),
    (_biography, 12),
    (_passage, 18),
    (_paraphrases, 18),
    (_sum, 6),
    (_story, 6),
)


def documents(count: int, seed: int = 0, heldout: bool = False) -> list[str]:
    """Return `count` documents of plain text, each ending in a newline, determined by `count`, `seed` and `heldout`.

    Training and held-out documents speak of the same fixed world, but no held-out document without context asks a
    (fact, phrasing) pair that training documents ask, and passing people are drawn anew.
    Raises InputError if `count` is not positive.
    """
    if count < 1:
        raise InputError(f"the corpus needs at least one document, not {count}")
    world = build_world(seed)
    rng = Random(f"documents {seed} {'heldout' if heldout else 'train'}")  # noqa: S311
    makers, weights = zip(*_MAKERS, strict=True)
    chosen = rng.choices(range(len(makers)), weights, k=count)
    return [_recall(rng, world, True) if heldout and i == 0 else makers[i](rng, world) for i in chosen]


def write(directory: Path, count: int, heldout: int = 100, seed: int = 0) -> None:
    """Write train.jsonl with `count` documents and heldout.jsonl with at most `heldout`, one `{"text": …}` a line.

    A held-out document that occurs among the training documents word for word is left out.
    Raises InputError if a count is not positive.
    """
    train = documents(count, seed)
    known = set(train)
    rest = [text for text in documents(heldout, seed, heldout=True) if text not in known]
    directory.mkdir(parents=True, exist_ok=True)
    for name, texts in (("train", train), ("heldout", rest)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (directory / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def main() -> None:
    """Run the command line: write the two files of a corpus."""
    parser = argparse.ArgumentParser(description="Write public text of a made-up world: train.jsonl and heldout.jsonl.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--documents", type=int, required=True, help="of train.jsonl")
    parser.add_argument("--heldout", type=int, default=100, help="of heldout.jsonl, at most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if min(args.documents, args.heldout) < 1:
        parser.error("--documents and --heldout must be at least 1")
    write(args.directory, args.documents, args.heldout, args.seed)


if __name__ == "__main__":
    main()
