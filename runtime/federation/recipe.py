"""Read the recipe of a federation: who the owners are, where their data is, and how they train.

It is YAML, as the recipes of `hecompile.runtime.recipes.training`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import peft
from pydantic import Field, field_validator, model_validator

from hecompile.checkpoint.families import LLAMA_LINEARS
from hecompile.errors import InputError
from hecompile.runtime.federation.protocol.channels import Roster
from hecompile.runtime.federation.protocol.layout import Layout
from hecompile.runtime.federation.protocol.settings import Agreement, FederationSection
from hecompile.runtime.federation.protocol.terms import Terms
from hecompile.runtime.recipes.document import load_document, resolve_paths, sections_at
from hecompile.runtime.recipes.privacy import PrivacySection
from hecompile.runtime.recipes.section import Positive, Section
from hecompile.runtime.recipes.training import TrainingSection
from hecompile.runtime.recipes.workplace import Workplace, resolve_worker

_PATH_KEYS = (
    ("model",),
    ("training", "output_dir"),
    *(("owners", name) for name in ("train_file", "validation_file", "plan", "worker_bundle")),
)


class OwnerSection(Section):
    """Describe one owner: its data, and where it trains.

    With `plan`, a client bundle, it trains through its encrypted worker (`worker`, or `worker_bundle` in its own process),
    otherwise in plaintext on its own machine from the recipe's checkpoint. `privacy` is a promise about every single
    example of `train_file`, as in a recipe for training alone.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    train_file: Path
    validation_file: Path | None = None
    plan: Path | None = None
    worker: str = "inprocess"
    worker_bundle: Path | None = None
    privacy: PrivacySection | None = None

    @model_validator(mode="after")
    def _reachable(self) -> OwnerSection:
        self.workplace()
        return self

    def workplace(self) -> Workplace | None:
        """Return where its products are computed, or None where it trains in plaintext on its own machine."""
        if self.plan is None:
            return None
        return Workplace(model=self.plan, worker=self.worker, worker_bundle=self.worker_bundle)


class LoraShape(Section):
    """Describe the adapter of all owners, in PEFT's names."""

    r: Positive = 8
    lora_alpha: Annotated[float, Field(gt=0)] = 16.0
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: list[str] = Field(default=list(LLAMA_LINEARS))
    layers_to_transform: list[Annotated[int, Field(ge=0)]] | None = None
    layers_pattern: list[str] | None = None

    def config(self) -> peft.LoraConfig:
        """Return it as PEFT's configuration."""
        return peft.LoraConfig(**self.model_dump(), task_type="CAUSAL_LM")


class FederationRecipe(Section):
    """Describe a federation: the owners, the checkpoint that all start from, and their training.

    * `training`: one round at one owner, `max_steps` local steps or `num_train_epochs` passes. Its `output_dir` holds
      everybody's files; those of an earlier federation are replaced with `overwrite_output_dir` only.
    * `reply_timeout`: seconds an owner may be silent before the round goes on without it.
    """

    command = "federate"
    model: Path
    owners: Annotated[list[OwnerSection], Field(min_length=2)]
    lora: LoraShape = LoraShape()
    sequence_buckets: list[Positive] = Field(default=[32, 48])
    batch_size: Positive = 16
    federation: FederationSection = FederationSection()
    training: TrainingSection
    reply_timeout: Annotated[float, Field(gt=0)] = 600.0

    @field_validator("training")
    @classmethod
    def _local(cls, section: TrainingSection) -> TrainingSection:
        if section.evaluates:
            raise ValueError("a federation evaluates at its end; drop the evaluation settings")
        return section

    @model_validator(mode="after")
    def _agreeable(self) -> FederationRecipe:
        self.agreement()
        return self

    @property
    def names(self) -> list[str]:
        return [owner.name for owner in self.owners]

    def agreement(self) -> Agreement:
        """Return what the owners agree on."""
        return Agreement.of(self.names, self.federation)

    def terms(self, roster: Roster, layout: Layout) -> Terms:
        """Return what the recipe's owners go by, with this roster and this layout of the adapter."""
        return Terms(self.agreement(), roster, layout)

    def owner(self, name: str) -> OwnerSection:
        """Return the owner of that name. Raises InputError for a stranger."""
        for owner in self.owners:
            if owner.name == name:
                return owner
        raise InputError(f"the recipe has no owner {name!r}; it has {', '.join(self.names)}")


def load_federation(path: str | Path, overrides: Sequence[str] = ()) -> FederationRecipe:
    """Load the recipe of a federation, see `hecompile.runtime.recipes.document.load_document`."""
    return load_document(path, overrides, FederationRecipe, _resolve)


def _resolve(document: dict[str, Any], directory: Path) -> None:
    resolve_paths(document, _PATH_KEYS, directory)
    for owner in sections_at(document, ("owners",)):
        resolve_worker(owner, directory)
