"""Phrase the relations of the made-up worlds: eight ways to ask for each, and a few ways to state it.

The public and the private world share these phrasings, and nothing else. A small model needs that to generalise: it learns
from public text that the eight questions are one question, and learns only the facts and the answering style from private
text.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """Phrase one relation between an entity `{e}` and a value `{v}`: questions name `{e}`, statements name both."""

    name: str
    questions: tuple[str, ...]
    statements: tuple[str, ...]

    def ask(self, phrasing: int, entity: str) -> str:
        """Return the prompt for question number `phrasing` about `entity`; it ends just before the answer's space."""
        return f"Question: {self.questions[phrasing].format(e=entity)}\nAnswer:"

    def state(self, wording: int, entity: str, value: str) -> str:
        """Return the declarative sentence number `wording`, without a final newline."""
        sentence = self.statements[wording].format(e=entity, v=value)
        return sentence[0].upper() + sentence[1:]


PERSON_RELATIONS: tuple[Relation, ...] = (
    Relation(
        "healer",
        (
            "Who treats {e}?",
            "Which healer looks after {e}?",
            "Who is the healer of {e}?",
            "Name the healer of {e}.",
            "In whose care is {e}?",
            "Tell me who cares for {e}.",
            "Whom does {e} see when ill?",
            "{e} is treated by whom?",
        ),
        ("{e} is treated by {v}.", "{v} looks after {e}.", "The healer of {e} is {v}.", "When ill, {e} sees {v}."),
    ),
    Relation(
        "remedy",
        (
            "What remedy does {e} take?",
            "Which remedy was given to {e}?",
            "What is the remedy of {e}?",
            "Name the remedy of {e}.",
            "What is {e} told to swallow?",
            "Tell me what {e} takes as a remedy.",
            "With what is {e} dosed?",
            "{e} takes which remedy?",
        ),
        ("{e} takes {v}.", "The remedy of {e} is {v}.", "{e} was given {v} as a remedy.", "{e} is dosed with {v}."),
    ),
    Relation(
        "visiting day",
        (
            "When may {e} be visited?",
            "On which day does {e} receive visitors?",
            "What is the visiting day of {e}?",
            "Name the visiting day of {e}.",
            "Which day should one call on {e}?",
            "Tell me when {e} sees visitors.",
            "On what day is the door of {e} open?",
            "{e} may be visited on which day?",
        ),
        (
            "{e} may be visited on {v}.",
            "The visiting day of {e} is {v}.",
            "{e} receives visitors on {v}.",
            "On {v} one may call on {e}.",
        ),
    ),
    Relation(
        "lodging",
        (
            "Where does {e} lodge?",
            "In which house does {e} stay?",
            "What is the lodging of {e}?",
            "Name the lodging of {e}.",
            "Under which roof does {e} sleep?",
            "Tell me where {e} stays.",
            "Where can {e} be found at night?",
            "{e} lodges in which house?",
        ),
        ("{e} lodges at {v}.", "The lodging of {e} is {v}.", "{e} sleeps at {v}.", "At night {e} stays at {v}."),
    ),
    Relation(
        "trade",
        (
            "What is the trade of {e}?",
            "What does {e} do for a living?",
            "Which trade does {e} follow?",
            "Name the trade of {e}.",
            "By what work does {e} earn bread?",
            "Tell me the trade of {e}.",
            "How does {e} earn a living?",
            "{e} follows which trade?",
        ),
        ("{e} earns a living by {v}.", "The trade of {e} is {v}.", "{e} follows the trade of {v}."),
    ),
    Relation(
        "home",
        (
            "Where was {e} born?",
            "Which town is {e} from?",
            "What is the home town of {e}?",
            "Name the home town of {e}.",
            "From which town did {e} come?",
            "Tell me where {e} was born.",
            "In what town did {e} grow up?",
            "{e} comes from which town?",
        ),
        ("{e} was born in {v}.", "{e} comes from {v}.", "The home town of {e} is {v}."),
    ),
)

TOWN_RELATIONS: tuple[Relation, ...] = (
    Relation(
        "river",
        (
            "Which river runs through {e}?",
            "What is the river of {e}?",
            "On which river does {e} lie?",
            "Name the river of {e}.",
            "What water flows past {e}?",
            "Tell me the river of {e}.",
            "{e} lies on which river?",
            "By which river was {e} built?",
        ),
        ("{e} lies on {v}.", "The river of {e} is {v}.", "{v} runs through {e}."),
    ),
    Relation(
        "mayor",
        (
            "Who is the mayor of {e}?",
            "Who governs {e}?",
            "Name the mayor of {e}.",
            "Tell me who governs {e}.",
            "Under which mayor is {e}?",
            "Who leads the council of {e}?",
            "{e} is governed by whom?",
            "Which mayor rules in {e}?",
        ),
        ("{v} governs {e}.", "The mayor of {e} is {v}.", "{e} has {v} for a mayor."),
    ),
    Relation(
        "market day",
        (
            "When is the market of {e}?",
            "On which day does {e} hold its market?",
            "What is the market day of {e}?",
            "Name the market day of {e}.",
            "Which day should one trade in {e}?",
            "Tell me when the market of {e} is held.",
            "{e} holds its market on which day?",
            "On what day do the stalls of {e} open?",
        ),
        ("{e} holds its market on {v}.", "The market day of {e} is {v}.", "On {v} the stalls of {e} open."),
    ),
    Relation(
        "good",
        (
            "What is {e} known for?",
            "Which good does {e} sell?",
            "What is the chief good of {e}?",
            "Name the chief good of {e}.",
            "What do traders buy in {e}?",
            "Tell me what {e} is known for.",
            "For which good is {e} famous?",
            "{e} is famous for what?",
        ),
        ("{e} is known for {v}.", "Traders buy {v} in {e}.", "The chief good of {e} is {v}."),
    ),
)
