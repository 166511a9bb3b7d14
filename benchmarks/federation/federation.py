"""Measure what the adapter of several owners knows, beside the adapter of each owner alone."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from benchmarks.report import table
from hecompile.models import TINY_LLAMA
from hecompile.models.worlds.private_owners import owner_names, write
from hecompile.runtime.federation.comparison import CheckedRound, Lab
from hecompile.runtime.federation.protocol.settings import FederationSection, NoiseSection
from hecompile.runtime.federation.recipe import FederationRecipe, load_federation
from hecompile.runtime.federation.report import accuracy
from hecompile.runtime.privacy.accountant import Mechanism, spent_epsilon
from hecompile.runtime.privacy.ledger import PrivacyLedger, Subject
from hecompile.runtime.recipes.privacy import PrivacySection

RECIPE = TINY_LLAMA.parent / "recipes" / "federation.yaml"
NOISE = NoiseSection(clip=4.0, noise_multiplier=0.8)
NOISY_ROUNDS = 4
PROMISE = PrivacySection(epsilon=8.0, delta=1e-3, max_grad_norm=1.0)

PROSE = """\
## A federation: what the adapter knows

Accuracy of the small Llama (exact match on held-out phrasings of private questions; every owner's patients are its own).
`models/recipes/federation.yaml` for three owners, {rounds} rounds of {steps} local steps; the same for five with
{steps_five}. Alone has as many steps as the owner has in the federation. Encrypted rounds run through the same handlers
and bytes as between processes.
"""


def run(quick: bool) -> str:
    """Return Markdown: accuracy with three owners and all variants, then with five."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        three, five = _recipe(Path(folder), 3, quick), _recipe(Path(folder), 5, quick)
        steps = {"steps": three.training.max_steps, "steps_five": five.training.max_steps}
        parts = [PROSE.format(rounds=three.federation.rounds, **steps)]
        parts.append(_accuracy(three, Path(folder), everything=True))
        parts.append(_accuracy(five, Path(folder), everything=False))
    return "\n".join(parts)


def _recipe(folder: Path, owners: int, quick: bool) -> FederationRecipe:
    data = folder / f"of-{owners}"
    write(data, owners)
    recipe = load_federation(RECIPE, [f"training.output_dir={data / 'runs'}"])
    sections = [
        {"name": name, "train_file": data / f"{name}.train.jsonl", "validation_file": data / f"{name}.heldout.jsonl"}
        for name in owner_names(owners)
    ]
    federation = recipe.federation.model_dump() | {"threshold": None, "minimum": None, "rounds": 2 if quick else 10}
    steps = 1 if quick else 12 if owners == 3 else 8
    document = recipe.model_dump() | {"owners": sections, "federation": federation}
    document["training"] = document["training"] | {"max_steps": steps}
    return FederationRecipe.model_validate(document)


def _accuracy(recipe: FederationRecipe, folder: Path, everything: bool) -> str:
    """Train all ways; with `everything`, also each owner alone and every variant of the federation."""
    lab = Lab.open(recipe)
    rows: dict[str, Mapping[str, float]] = {}
    if everything:
        rows |= {f"{name} alone": accuracy(lab, lab.alone(name)) for name in recipe.names}
    rows["federated, in the clear"] = accuracy(lab, lab.plain())
    started = time.perf_counter()
    adapter, rounds = lab.encrypted(recipe.federation)
    seconds = time.perf_counter() - started
    rows["federated, encrypted, shared mask rising to 50 %"] = accuracy(lab, adapter)
    notes = [_rounds_note(rounds, seconds)]
    if everything:
        notes.append(_pruned_otherwise(lab, rows, rounds[-1]))
        for name, row, note in (
            _private_examples(recipe, folder),
            _private_owners(lab, recipe.federation, folder),
        ):
            rows[name] = row
            notes.append(note)
    columns = list(next(iter(rows.values())))
    body = [[name, *(f"{100 * row[column]:.1f} %" for column in columns)] for name, row in rows.items()]
    return "\n".join([table((f"{len(recipe.owners)} owners", *columns), body), "", *notes])


def _pruned_otherwise(lab: Lab, rows: dict[str, Mapping[str, float]], shared: CheckedRound) -> str:
    """Train with the published pruning and with A frozen, add their rows, and compare what the last rounds sent."""
    section = lab.recipe.federation
    assert section.pruning is not None
    by_client = section.pruning.model_copy(update={"mask": "per_client"})
    adapter, published = lab.encrypted(section.model_copy(update={"pruning": by_client}))
    rows["federated, encrypted, each client prunes (published)"] = accuracy(lab, adapter)
    adapter, frozen = lab.encrypted(section.model_copy(update={"freeze_a": True, "pruning": None}))
    rows["federated, encrypted, A frozen (FFA-LoRA), no pruning"] = accuracy(lab, adapter)
    return (
        f"Bytes up per owner in the last round: shared mask {_kilobytes(shared)} kB, pruned by each client "
        f"{_kilobytes(published[-1])} kB, A frozen {_kilobytes(frozen[-1])} kB.\n"
    )


def _rounds_note(rounds: list[CheckedRound], seconds: float) -> str:
    worst = max(one.error / one.result.error_bound for one in rounds)
    largest = max(one.error for one in rounds)
    relative = max(one.error / float(np.sqrt(np.mean(one.result.mean**2))) for one in rounds)
    return (
        f"Every encrypted round's mean equals that of the exact updates within the stated bound: largest difference "
        f"{largest:.1e}, at most {worst:.2f} of its bound and {relative:.1e} of the mean's root mean square in any "
        f"round. Bytes up per owner and round: {_kilobytes(rounds[0])} kB in the first, {_kilobytes(rounds[-1])} kB in the "
        f"last. All rounds with training: {seconds:.0f} s.\n"
    )


def _kilobytes(one: CheckedRound) -> str:
    return f"{one.result.bytes_up / len(one.result.contributors) / 1e3:.0f}"


def _private_examples(recipe: FederationRecipe, folder: Path) -> tuple[str, Mapping[str, float], str]:
    """Run the federation with DP-SGD at every owner, without pruning: name, accuracy, note."""
    owners = [
        owner.model_copy(update={"privacy": PROMISE.model_copy(update={"ledger": folder / f"{owner.name}.steps"})})
        for owner in recipe.owners
    ]
    private = recipe.model_copy(update={"owners": owners})
    with ExitStack() as stack:
        lab = Lab.open(private, stack)
        adapter, _ = lab.encrypted(recipe.federation.model_copy(update={"pruning": None}))
        row = accuracy(lab, adapter)
        spent = [trainer.private.describe() for trainer in lab.trainers.values() if trainer.private is not None]
    noise = ", ".join(line.rpartition(" ")[2] for line in spent)
    note = (
        f"Example-level differential privacy: every owner trains by DP-SGD within epsilon {PROMISE.epsilon:g} at delta "
        f"{PROMISE.delta:g} for each of its own examples over all rounds, whoever looks (noise multipliers {noise}).\n"
    )
    return f"federated, encrypted, example-level DP, epsilon {PROMISE.epsilon:g} at each owner", row, note


def _private_owners(lab: Lab, section: FederationSection, folder: Path) -> tuple[str, Mapping[str, float], str]:
    """Run the federation with noise on whole updates, shared out over the owners: name, accuracy, note."""
    noisy = section.model_copy(update={"privacy": NOISE, "rounds": min(NOISY_ROUNDS, section.rounds), "pruning": None})
    with ExitStack() as stack:
        ledgers = {
            owner.name: stack.enter_context(
                PrivacyLedger(folder / f"{owner.name}.ledger", Subject.of_file(owner.train_file, 3, NOISE.delta))
            )
            for owner in lab.recipe.owners
        }
        adapter, rounds = lab.encrypted(noisy, ledgers)
        epsilon = next(iter(ledgers.values())).spent()
    one = spent_epsilon([(Mechanism(NOISE.noise_multiplier, 1.0), 1)], NOISE.delta)
    size = rounds[0].result.mean.size
    needed = NOISE.noise_multiplier * np.sqrt(size)
    note = (
        f"Client-level differential privacy (clip {NOISE.clip:g}, noise multiplier {NOISE.noise_multiplier:g}: epsilon "
        f"{one:.3g} for one round, {epsilon:.3g} for {noisy.rounds}, delta {NOISE.delta:g}, in every owner's ledger) hides "
        f"a whole owner among the others, which three owners are too few for: noise and update are of one size from about "
        f"{needed:.0f} owners on, "
        "the noise multiplier times the square root of the number of coordinates.\n"
    )
    return f"federated, encrypted, client-level DP, epsilon {epsilon:.3g}", accuracy(lab, adapter), note
