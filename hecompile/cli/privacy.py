"""Run `hecompile privacy`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hecompile.terminal import wide_console


def privacy(
    ledger: Annotated[Path, typer.Argument(help="The ledger: by default TRAIN_FILE.ledger, beside the training file.")],
    delta: Annotated[float | None, typer.Option(help="Report epsilon at another delta too.")] = None,
) -> None:
    """Show what has been released about a dataset and the epsilon that it has spent: with sampling, and for an adversary who
    knows who was in each sample."""
    from rich.table import Table

    from hecompile.runtime.privacy.accountant import Mechanism, spent_epsilon
    from hecompile.runtime.privacy.ledger import PrivacyLedger, Subject

    subject = Subject.of_ledger(ledger)
    with PrivacyLedger(ledger, subject) as opened:
        history = opened.history
    about = f"dataset {subject.dataset[:16]}" if subject.dataset else "a checkpoint's copy, which names no dataset"
    table = Table(title=f"{ledger}: {about}, {subject.examples} examples")
    for heading in ("releases", "noise multiplier", "sampling rate"):
        table.add_column(heading, justify="right")
    for mechanism, count in history:
        table.add_row(str(count), f"{mechanism.noise_multiplier:.4g}", f"{mechanism.sampling_rate:.4g}")
    console = wide_console()
    console.print(table)
    unsampled = [(Mechanism(mechanism.noise_multiplier, 1.0), count) for mechanism, count in history]
    for one in dict.fromkeys([subject.delta, *([] if delta is None else [delta])]):
        console.print(
            f"epsilon {spent_epsilon(history, one):.4g} at delta {one:g} ({spent_epsilon(unsampled, one):.4g} to "
            f"somebody who knows the samples)",
            soft_wrap=True,
        )
