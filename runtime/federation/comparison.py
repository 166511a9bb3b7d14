"""Train what a federation is compared with, on the same data and steps: each owner alone, and all in the clear."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hecompile.errors import InputError
from hecompile.runtime.federation.local import LocalTrainer
from hecompile.runtime.federation.local_model import LocalModel, plaintext_model
from hecompile.runtime.federation.owner import local_trainer, owner_promise
from hecompile.runtime.federation.protocol.channels import Identity
from hecompile.runtime.federation.protocol.keyring import MemoryKeys
from hecompile.runtime.federation.protocol.layout import adapter_digest, mask_digest
from hecompile.runtime.federation.protocol.participant import LocalUpdate, Participant, Train
from hecompile.runtime.federation.protocol.rounds import Federation, in_process
from hecompile.runtime.federation.protocol.server_round import RoundResult, prune_global
from hecompile.runtime.federation.protocol.settings import Agreement, FederationSection, RoundHeader
from hecompile.runtime.federation.protocol.terms import Terms
from hecompile.runtime.federation.recipe import FederationRecipe
from hecompile.runtime.model.data import Examples
from hecompile.runtime.privacy.ledger import PrivacyLedger


@dataclass(frozen=True)
class Lab:
    """Hold all owners of a recipe in one process for experiments; they train one plaintext model, in turn."""

    recipe: FederationRecipe
    local: LocalModel
    trainers: Mapping[str, LocalTrainer]
    initial: NDArray[np.float32]

    @staticmethod
    def open(recipe: FederationRecipe, stack: ExitStack | None = None, *, trains: bool = True) -> Lab:
        """Load the model, which takes what the owners' plans take, and with `trains` everybody's data.

        Where owners that train have privacy sections, `stack` must be given: it closes their ledgers. Raises InputError
        without it.
        """
        local = plaintext_model(recipe, [owner.plan for owner in recipe.owners if owner.plan is not None])
        trainers = {}
        for owner in recipe.owners if trains else ():
            promise = owner_promise(recipe, owner, local)
            private = None if stack is None else stack.enter_context(promise)
            if private is None and owner.privacy is not None:
                raise InputError(
                    f"{owner.name} has a privacy section, which a comparison with it alone would not keep: run it with "
                    "--no-compare"
                )
            in_plaintext = owner.model_copy(update={"plan": None})
            trainers[owner.name] = local_trainer(recipe, in_plaintext, local, private)
        return Lab(recipe, local, trainers, local.layout.flatten(local.model.adapter_state()))

    def heldout(self) -> dict[str, Examples]:
        """Read the held-out questions by owner, for those that have some."""
        files = {owner.name: owner.validation_file for owner in self.recipe.owners}
        return {name: self.local.examples(path) for name, path in files.items() if path is not None}

    def alone(self, name: str) -> NDArray[np.float32]:
        """Return the adapter of one owner after all rounds by itself, float32 `[size]`."""
        everything = np.ones(self.local.layout.size, dtype=bool)
        adapter = self.initial
        for number in range(1, self.recipe.federation.rounds + 1):
            adapter = self.trainers[name].train(number, adapter, everything, self.recipe.federation)
        return adapter

    def plain(self, report: Callable[[int], None] = lambda number: None) -> NDArray[np.float32]:
        """Return the adapter, float32 `[size]`, of the federation without encryption and without pruning."""
        section = self.recipe.federation.model_copy(update={"pruning": None, "privacy": None})
        agreement = Agreement.of(self.recipe.names, section)
        adapter = self.initial
        for number in range(1, section.rounds + 1):
            adapter = self.plain_round(agreement, number, adapter)[0]
            report(number)
        return adapter

    def plain_round(
        self, agreement: Agreement, number: int, adapter: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], dict[str, LocalUpdate]]:
        """Run one round in the clear with the agreement's pruning; return the adapter and each owner's update."""
        start, mask = prune_global(self.local.layout, agreement, number, adapter)
        header = RoundHeader(
            federation="0" * 32, number=number, nonce="0" * 32, agreement=agreement, layout=self.local.layout.digest(),
            mask=mask_digest(mask), adapter=adapter_digest(start), coordinates=int(mask.sum()),
        )  # fmt: skip
        updates = {name: trainer(header, start, mask) for name, trainer in self.trainers.items()}
        return (start + weighted_mean(updates)).astype(np.float32), updates

    def encrypted(
        self, section: FederationSection, ledgers: Mapping[str, PrivacyLedger] | None = None
    ) -> tuple[NDArray[np.float32], list[CheckedRound]]:
        """Run the federation as it is, all in this process; return the adapter float32 `[size]` and its rounds, checked.

        Each round's mean is compared with that of the exact updates. Under differential privacy there is nothing to compare
        with, and `ledgers` must be given.
        """
        updates: dict[str, LocalUpdate] = {}
        terms, participants = self._participants(section, updates, ledgers or {})
        federation, adapter, rounds = Federation(terms), self.initial, list[CheckedRound]()
        for number in range(1, section.rounds + 1):
            _, mask = prune_global(terms.layout, terms.agreement, number, adapter)
            result = federation.round(number, adapter, in_process(participants))
            error = float("nan")
            if section.privacy is None:
                error = float(np.abs(result.mean - weighted_mean(updates)[mask]).max())
            rounds.append(CheckedRound(result, error))
            adapter = result.adapter
        return adapter, rounds

    def _participants(
        self, section: FederationSection, updates: dict[str, LocalUpdate], ledgers: Mapping[str, PrivacyLedger]
    ) -> tuple[Terms, dict[str, Participant]]:
        """Make participants with fresh identities, which keep each update in `updates` beside sending it encrypted."""

        def recording(name: str) -> Train:
            def train(header: RoundHeader, adapter: NDArray[np.float32], mask: NDArray[np.bool_]) -> LocalUpdate:
                updates[name] = self.trainers[name](header, adapter, mask)
                return updates[name]

            return train

        identities = {name: Identity.generate(name) for name in self.recipe.names}
        roster = {name: identity.public for name, identity in identities.items()}
        terms = Terms(Agreement.of(self.recipe.names, section), roster, self.local.layout)
        return terms, {
            name: Participant(identity, terms, MemoryKeys(), recording(name), ledgers.get(name))
            for name, identity in identities.items()
        }


@dataclass(frozen=True)
class CheckedRound:
    """Hold a round and its error: the largest difference of its mean to the weighted mean of the exact updates."""

    result: RoundResult
    error: float


def weighted_mean(updates: Mapping[str, LocalUpdate]) -> NDArray[np.float64]:
    """Return Σ n_k·Δ_k / Σ n_k, float64 `[size]`, over updates Δ_k of n_k samples."""
    total = sum(update.samples for update in updates.values())
    return sum(
        (update.delta.astype(np.float64) * (update.samples / total) for update in updates.values()),
        np.zeros(next(iter(updates.values())).delta.shape),
    )
