"""Show what a federation gains, and what it sends, to people."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from hecompile.runtime.federation.comparison import Lab
from hecompile.runtime.federation.recipe import FederationRecipe
from hecompile.runtime.federation.records import RoundRecord


def accuracy(lab: Lab, adapter: NDArray[np.float32]) -> dict[str, float]:
    """Return exact match on the held-out questions of each owner, and over all of them under ``all``."""
    shares, right, prompts = {}, 0.0, 0
    for name, examples in lab.heldout().items():
        evaluation = lab.local.evaluate(adapter, examples)
        shares[name] = evaluation.exact_match or 0.0
        right += shares[name] * evaluation.prompts
        prompts += evaluation.prompts
    return {**shares, "all": right / max(1, prompts)}


def comparison_rows(
    lab: Lab, adapters: Mapping[str, NDArray[np.float32]], compare: bool, say: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """Return accuracy by adapter: the given ones, and with `compare` each owner alone and the plain federation."""
    rows = {"before": accuracy(lab, lab.initial)}
    if compare:
        for name in lab.recipe.names:
            say(f"for comparison: {name} alone")
            rows[f"{name} alone"] = accuracy(lab, lab.alone(name))
        say("for comparison: updates averaged in the clear")
        rows["federated, in the clear"] = accuracy(lab, lab.plain())
    return rows | {name: accuracy(lab, adapter) for name, adapter in adapters.items()}


def accuracy_table(
    recipe: FederationRecipe, adapters: Mapping[str, NDArray[np.float32]], compare: bool, say: Callable[[str], None]
) -> Table:
    """Build the table of `comparison_rows`."""
    lab = Lab.open(recipe)
    rows = comparison_rows(lab, adapters, compare, say)
    table = Table(title="exact match on held-out phrasings of each owner's private questions")
    table.add_column("adapter")
    columns = [*lab.heldout(), "all"]
    for column in columns:
        table.add_column(column, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(f"{100 * row[column]:.1f} %" for column in columns))
    return table


def bytes_line(records: Sequence[RoundRecord]) -> str:
    """Say how many bytes travelled, and how exact the sums are."""
    first, last = records[0], records[-1]
    return (
        f"up per owner and round: {first.bytes_up / len(first.contributors) / 1e3:.0f} kB in the first round, "
        f"{last.bytes_up / len(last.contributors) / 1e3:.0f} kB in the last ({last.coordinates} of {first.coordinates} "
        f"coordinates); largest error of a mean {max(record.error_bound for record in records):.1e}, its rms "
        f"{first.update_rms:.1e} in the first round, {last.update_rms:.1e} in the last"
    )
