"""Run an owner's side of a federation: its promises of privacy, its training, and its process."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hecompile.errors import FederationError, InputError
from hecompile.files import only_writer
from hecompile.he.aggregation.parameters import CLIENT_LIMIT
from hecompile.runtime.federation.local import LocalTrainer
from hecompile.runtime.federation.local_model import LocalModel, owner_model
from hecompile.runtime.federation.output import ADAPTER_DIR, clear_owner, only_owner, require_directory, require_free
from hecompile.runtime.federation.protocol.channels import Roster
from hecompile.runtime.federation.protocol.keyring import DirectoryKeys
from hecompile.runtime.federation.protocol.messages import Finished
from hecompile.runtime.federation.protocol.participant import LocalUpdate, Participant, Train
from hecompile.runtime.federation.protocol.settings import RoundHeader
from hecompile.runtime.federation.recipe import FederationRecipe, OwnerSection
from hecompile.runtime.federation.roster import own_identity
from hecompile.runtime.federation.sockets import longest_silence, take_part
from hecompile.runtime.federation.state import begin_owner, check_owner
from hecompile.runtime.privacy.ledger import PrivacyLedger, Subject
from hecompile.runtime.privacy.promise import PrivateRun, PrivateSteps, private_steps

LEDGER_SUFFIX = ".rounds.ledger"
ROUNDS_DIR = "rounds"


def join(
    recipe: FederationRecipe, name: str, roster: Roster, keys: Path, address: str, *, resume: bool = False
) -> Path:
    """Take part until the federation ends, save the global adapter, and return its directory.

    `keys` is the owner's private folder, with the record of its rounds: with `resume` it goes on in the federation that is
    recorded there, and in no other. Raises InputError and FederationError as `server.serve` does, for the owner's own copy.
    """
    recipe.owner(name)  # a stranger is refused before a folder is made
    with only_owner(recipe.training, name):
        return _join(recipe, name, roster, keys, address, resume)


def _join(recipe: FederationRecipe, name: str, roster: Roster, keys: Path, address: str, resume: bool) -> Path:
    owner = recipe.owner(name)
    replaces = False
    if resume:
        require_directory(recipe.training)
        check_owner(recipe, name)
    else:
        replaces = require_free(recipe.training, owners=[name])
    identity = own_identity(name, keys)
    # One private folder is in one federation at a time, wherever their output directories are.
    with only_writer(keys / ROUNDS_DIR, f"the private folder {keys}"):
        rounds = DirectoryKeys(keys / ROUNDS_DIR, fresh=not resume, forget=recipe.training.overwrite_output_dir)
        left = max(1, recipe.federation.rounds - rounds.rounds_begun()) if resume else None
        with (
            owner_model(recipe, owner) as local,
            owner_promise(recipe, owner, local, left) as private,
            owner_ledger(recipe, owner) as ledger,
        ):
            train: Train = local_trainer(recipe, owner, local, private)
            if not resume:
                train = _beginning_first(train, recipe, name, replaces)
            participant = Participant(identity, recipe.terms(roster, local.layout), rounds, train, ledger)
            silence = longest_silence(recipe.reply_timeout)
            finished = take_part(participant, identity, address, silence=silence)
            directory = save_finished(recipe, name, local, finished)
            rounds.finish()
            return directory


def _beginning_first(train: Train, recipe: FederationRecipe, name: str, replaces: bool) -> Train:
    """Return `train` such that its first call removes what an earlier federation left, and notes the recipe."""
    first = True

    def clearing(header: RoundHeader, adapter: NDArray[np.float32], mask: NDArray[np.bool_]) -> LocalUpdate:
        nonlocal first
        if first:
            if replaces or header.number == 1:  # an owner that comes back in the middle keeps the metrics that it has
                clear_owner(recipe.training.output_dir, name)
            begin_owner(recipe, name)
            first = False
        return train(header, adapter, mask)

    return clearing


def save_finished(recipe: FederationRecipe, name: str, local: LocalModel, finished: Finished) -> Path:
    """Save an owner's copy of the final global adapter, and return its directory.

    Raises FederationError for one of another size, or with values that are not finite; nothing is written then.
    """
    whole = len(finished.adapter) == 4 * local.layout.size
    adapter = np.frombuffer(finished.adapter if whole else b"", dtype="<f4")
    if not whole or not np.isfinite(adapter).all():
        raise FederationError(
            f"the server ended with an adapter of {len(finished.adapter)} bytes that is not the federation's: "
            f"{local.layout.size} finite values of 4 bytes"
        )
    return local.save(adapter, recipe.training.output_dir / name / ADAPTER_DIR, recipe.model)


@contextmanager
def owner_ledger(recipe: FederationRecipe, owner: OwnerSection) -> Iterator[PrivacyLedger | None]:
    """Open the record, beside its training file, of all that the owner as a whole released in any federation.

    Yields None without differential privacy of owners.
    """
    privacy = recipe.federation.privacy
    if privacy is None:
        yield None
        return
    # The unit of privacy is one owner of a federation of any size, so that delta is held against the largest.
    subject = Subject.of_file(owner.train_file, CLIENT_LIMIT, privacy.delta)
    path = owner.train_file.with_name(owner.train_file.name + LEDGER_SUFFIX)
    with PrivacyLedger(path, subject, privacy.epsilon) as ledger:
        yield ledger


@contextmanager
def owner_promise(
    recipe: FederationRecipe, owner: OwnerSection, local: LocalModel, rounds: int | None = None
) -> Iterator[PrivateSteps | None]:
    """Open the owner's promise about single examples, with noise for the steps of `rounds` (of all rounds by default).

    Yields None where the owner has no privacy section. Raises InputError where the budget does not suffice, PrivacyError
    for a bad ledger.
    """
    if owner.privacy is None:
        yield None
        return
    section, count = recipe.training, len(local.examples(owner.train_file))
    batch = section.examples_per_step
    a_round = (
        section.max_steps if section.max_steps > 0 else math.ceil(section.num_train_epochs * math.ceil(count / batch))
    )
    planned = a_round * recipe.federation.rounds
    steps = planned if rounds is None else a_round * rounds
    run = PrivateRun(owner.train_file, count, batch, steps, whole=planned)
    with private_steps(owner.privacy, run) as private:
        yield private


def local_trainer(
    recipe: FederationRecipe, owner: OwnerSection, local: LocalModel, private: PrivateSteps | None = None
) -> LocalTrainer:
    """Build the owner's trainer, from its place in the recipe and its data.

    Raises InputError for too many examples, or steps of more rows than the owner's plan takes.
    """
    examples = local.examples(owner.train_file)
    rows = recipe.training.per_device_train_batch_size
    if owner.plan is not None and min(rows, len(examples)) > local.model.batch_size:
        raise InputError(
            f"training.per_device_train_batch_size {rows} is more than the plan of {owner.name} takes, "
            f"{local.model.batch_size} rows: lower it, or export {owner.plan} with a larger --batch-size"
        )
    if len(examples) > recipe.federation.max_samples and recipe.federation.privacy is None:
        raise InputError(
            f"{owner.train_file} has {len(examples)} examples, over federation.max_samples {recipe.federation.max_samples}"
        )
    own = {
        "output_dir": recipe.training.output_dir / owner.name,
        "seed": recipe.training.seed + recipe.names.index(owner.name),
    }
    return LocalTrainer(local, examples, recipe.training.model_copy(update=own), private)
