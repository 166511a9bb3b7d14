"""Show what a federation gains, and what it sends, to people."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from hecompile.runtime.federation.comparison import Lab
from hecompile.runtime.federation.recipe import FederationRecipe
from hecompile.runtime.federation.records import RoundRecord
from hecompile.runtime.model.evaluation import Evaluation


def evaluations(lab: Lab, adapter: NDArray[np.float32]) -> dict[str, Evaluation]:
    """Evaluate on the held-out lines of each owner that has some, and put them together under ``all``."""
    each = {name: lab.local.evaluate(adapter, examples) for name, examples in lab.heldout().items()}
    return {**each, "all": _together(list(each.values()))} if each else {}


def accuracy(lab: Lab, adapter: NDArray[np.float32]) -> dict[str, float]:
    """Return exact match on the held-out questions of each owner, and over all of them under ``all``."""
    return {name: one.exact_match or 0.0 for name, one in evaluations(lab, adapter).items()}


def _together(each: Sequence[Evaluation]) -> Evaluation:
    tokens, prompts = sum(one.tokens for one in each), sum(one.prompts for one in each)
    right = sum((one.exact_match or 0.0) * one.prompts for one in each)
    loss = sum(one.loss * one.tokens for one in each) / tokens
    return Evaluation(loss, right / prompts if prompts else None, tokens, prompts)


def comparison_rows(
    lab: Lab, adapters: Mapping[str, NDArray[np.float32]], compare: bool, say: Callable[[str], None]
) -> dict[str, dict[str, Evaluation]]:
    """Evaluate by adapter: the given ones, and with `compare` each owner alone and the plain federation."""
    rows = {"before": evaluations(lab, lab.initial)}
    if compare:
        for name in lab.recipe.names:
            say(f"for comparison: {name} alone")
            rows[f"{name} alone"] = evaluations(lab, lab.alone(name))
        say("for comparison: updates averaged in the clear")
        rows["federated, in the clear"] = evaluations(lab, lab.plain())
    return rows | {name: evaluations(lab, adapter) for name, adapter in adapters.items()}


def check_tables(recipe: FederationRecipe, compare: bool) -> None:
    """Read all that the tables are made of, so that nothing of it is missed after the rounds. Raises InputError."""
    Lab.open(recipe, trains=compare).heldout()


def accuracy_table(
    recipe: FederationRecipe, adapters: Mapping[str, NDArray[np.float32]], compare: bool, say: Callable[[str], None]
) -> Table:
    """Build the table of `comparison_rows`."""
    lab = Lab.open(recipe, trains=compare)
    rows = comparison_rows(lab, adapters, compare, say)
    table = Table(title="exact match, and loss per token, on each owner's held-out lines")
    table.add_column("adapter")
    columns = [*lab.heldout(), "all"]
    for column in columns:
        table.add_column(column, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(_cell(row.get(column)) for column in columns))
    return table


def _cell(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return ""
    match = "" if evaluation.exact_match is None else f"{100 * evaluation.exact_match:.1f} %, "
    return f"{match}{evaluation.loss:.3f}"


def bytes_line(records: Sequence[RoundRecord]) -> str:
    """Say how many bytes travelled, and how exact the sums are."""
    first, last = records[0], records[-1]
    return (
        f"up per owner and round: {first.bytes_up / len(first.contributors) / 1e3:.0f} kB in the first round, "
        f"{last.bytes_up / len(last.contributors) / 1e3:.0f} kB in the last ({last.coordinates} of {first.coordinates} "
        f"coordinates); largest error of a mean {max(record.error_bound for record in records):.1e}, its rms "
        f"{first.update_rms:.1e} in the first round, {last.update_rms:.1e} in the last"
    )
