"""An owner's side of a recipe: its model, its data, and what it does with them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hecompile.errors import InputError
from hecompile.he.aggregation.parameters import CLIENT_LIMIT
from hecompile.runtime.client.session import open_session
from hecompile.runtime.federation.local import LocalTrainer
from hecompile.runtime.federation.protocol.layout import Layout
from hecompile.runtime.federation.recipe import FederationRecipe, OwnerSection
from hecompile.runtime.model.adapter import AdapterModel, save_adapter
from hecompile.runtime.model.data import Examples, eos_and_pad, load_examples
from hecompile.runtime.model.evaluation import Evaluation, evaluate
from hecompile.runtime.model.plaintext import PlaintextPeftModel
from hecompile.runtime.privacy.ledger import PrivacyLedger, Subject
from hecompile.runtime.privacy.promise import PrivateRun, PrivateSteps, private_steps
from hecompile.runtime.recipes.training import LoraSection, check_lora

LEDGER_SUFFIX = ".rounds.ledger"


@dataclass(frozen=True)
class LocalModel:
    """A model to train or evaluate, and its tokenizer."""

    model: AdapterModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def layout(self) -> Layout:
        return Layout.of(self.model.adapter_state())

    def examples(self, path: Path) -> Examples:
        """Tokenised."""
        return load_examples(path, self.tokenizer, self.model.sequence_buckets)

    def evaluate(self, adapter: NDArray[np.float32], examples: Examples) -> Evaluation:
        """Of the adapter float32 `[size]`."""
        self.model.load_adapter_state(self.layout.unflatten(adapter))
        return evaluate(self.model, examples, eos_and_pad(self.tokenizer)[1])

    def save(self, adapter: NDArray[np.float32], directory: Path, base: Path) -> Path:
        """In PEFT's format."""
        self.model.load_adapter_state(self.layout.unflatten(adapter))
        return save_adapter(self.model, directory, base)


def plaintext_model(recipe: FederationRecipe) -> LocalModel:
    """The checkpoint with an adapter drawn from the recipe's seed: the same for all who draw it."""
    if not recipe.model.is_dir():
        raise InputError(f"recipe: no model directory {recipe.model}")
    torch.manual_seed(recipe.training.seed)
    model = PlaintextPeftModel.from_pretrained(
        recipe.model, recipe.lora.config(), tuple(recipe.sequence_buckets), recipe.batch_size
    )
    return LocalModel(model, AutoTokenizer.from_pretrained(recipe.model))


@contextmanager
def owner_model(recipe: FederationRecipe, owner: OwnerSection) -> Iterator[LocalModel]:
    """As `OwnerSection` says: on this machine, or through its encrypted worker. Raises InputError for a plan that was
    exported with another LoRA."""
    place = owner.workplace()
    if place is None:
        yield plaintext_model(recipe)
        return
    with open_session(place) as session:
        check_lora(LoraSection(**recipe.lora.model_dump()), session.model.peft_config)
        yield LocalModel(session.model, session.tokenizer)


@contextmanager
def owner_ledger(recipe: FederationRecipe, owner: OwnerSection) -> Iterator[PrivacyLedger | None]:
    """What the owner as a whole released in all federations, beside its training file; None without differential privacy of
    owners."""
    privacy = recipe.federation.privacy
    if privacy is None:
        yield None
        return
    # What is protected is one owner of a federation of any size, so that delta is held against the largest.
    subject = Subject.of_file(owner.train_file, CLIENT_LIMIT, privacy.delta)
    path = owner.train_file.with_name(owner.train_file.name + LEDGER_SUFFIX)
    with PrivacyLedger(path, subject, privacy.epsilon) as ledger:
        yield ledger


@contextmanager
def owner_promise(
    recipe: FederationRecipe, owner: OwnerSection, local: LocalModel, rounds: int | None = None
) -> Iterator[PrivateSteps | None]:
    """The owner's promise about single examples, its noise fixed for the steps of `rounds` (all of them by default); None
    without a privacy section. Raises InputError where the budget does not suffice, PrivacyError for a bad ledger."""
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
    """For the rounds. Checks the data before anything starts. Raises InputError."""
    examples = local.examples(owner.train_file)
    if len(examples) > recipe.federation.max_samples and recipe.federation.privacy is None:
        raise InputError(
            f"{owner.train_file} has {len(examples)} examples, over federation.max_samples {recipe.federation.max_samples}"
        )
    index = recipe.names.index(owner.name)
    folder = recipe.training.output_dir / owner.name
    return LocalTrainer(local.model, local.tokenizer, examples, recipe.training, folder, index, private)
