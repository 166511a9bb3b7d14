"""Train an owner's adapter between two messages: on its own text, within the mask, from the global adapter.

The optimizer is fresh in every round, as in FedAvg (McMahan et al., AISTATS 2017). FedProx (Li et al., MLSys 2020) adds
mu/2·‖w - w_global‖² to the loss; its gradient mu·(w - w_global) joins the others after these were clipped.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hecompile.runtime.federation.local_model import LocalModel
from hecompile.runtime.federation.protocol.participant import LocalUpdate
from hecompile.runtime.federation.protocol.pruning import prune_client
from hecompile.runtime.federation.protocol.settings import FederationSection, RoundHeader
from hecompile.runtime.model.adapter import AdapterModel
from hecompile.runtime.model.data import Examples, PadToBucket
from hecompile.runtime.privacy.promise import PrivateSteps
from hecompile.runtime.recipes.training import TrainingSection
from hecompile.runtime.training.private_trainer import PrivateTrainer
from hecompile.runtime.training.trainer import AdapterTrainer


class LocalTrainer:
    """Train the adapter of `local` for one round at a time; a `protocol.participant.Train`.

    Args:
        section: settings of one round. Its seed grows with the round; its learning rate falls as the federation says; its
            `output_dir` gets a folder with the metrics of each round.
        private: makes every step differentially private for each example (`hecompile.runtime.privacy`). What is sent
            consists of such steps alone: the promise holds against the server and the other owners.
    """

    def __init__(
        self, local: LocalModel, examples: Examples, section: TrainingSection, private: PrivateSteps | None = None
    ) -> None:
        self.private = private
        self._local = local
        self._layout = local.layout
        self._examples = examples
        self._section = section
        self._collate = PadToBucket(local.model.sequence_buckets, local.pad_token_id)

    def __call__(self, header: RoundHeader, adapter: NDArray[np.float32], mask: NDArray[np.bool_]) -> LocalUpdate:
        """Train one round, prune where owners do so by themselves, and return what changed."""
        section = header.agreement.section
        after = self.train(header.number, adapter, mask, section)
        if section.pruning is not None and section.pruning.mask == "per_client":
            after = prune_client(self._layout, after, header.rate)
        return LocalUpdate(np.where(mask, after - adapter, np.float32(0)), len(self._examples))

    def train(
        self,
        number: int,
        adapter: NDArray[np.float32],
        mask: NDArray[np.bool_],
        federation: FederationSection,
        steps: int | None = None,
    ) -> NDArray[np.float32]:
        """Return the adapter after the steps of round `number` (or `steps`) from `adapter`, both float32 `[size]`.

        Coordinates where `mask` is false stay as they are.
        """
        model = self._local.model
        start = self._layout.unflatten(adapter)
        model.load_adapter_state(start)
        settings: dict[str, Any] = {}
        parts = (model, self._round_section(number, federation, steps), settings, self._examples, None, self._collate)
        trainer = AdapterTrainer(*parts) if self.private is None else PrivateTrainer(self.private, *parts)
        mu = federation.mu if federation.algorithm == "fedprox" else 0.0
        kept = self._layout.unflatten(mask.astype(np.float32))
        trainer.add_callback(_Constraints(model, start, kept, mu))
        trainer.train()
        return np.where(mask, self._layout.flatten(model.adapter_state()), adapter)

    def _round_section(self, number: int, federation: FederationSection, steps: int | None) -> TrainingSection:
        changes: dict[str, Any] = {
            "output_dir": self._section.output_dir / f"round-{number}",
            "seed": self._section.seed + 1000 * number,
            "data_seed": None,
            "save_strategy": "no",
            "disable_tqdm": True,
            "learning_rate": self._section.learning_rate * federation.decay(number),
        }
        if steps is not None:
            changes["max_steps"] = steps
        return self._section.model_copy(update=changes)


class _Constraints(TrainerCallback):
    """Change the gradients between clipping and update: add the proximal term, then apply the mask."""

    def __init__(
        self, model: AdapterModel, start: dict[str, torch.Tensor], kept: dict[str, torch.Tensor], mu: float
    ) -> None:
        self._model = model
        self._start = start
        self._kept = kept
        self._mu = mu

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        with torch.no_grad():
            for name, parameter in self._model.adapter_state().items():
                if parameter.grad is None:
                    continue
                if self._mu > 0:
                    parameter.grad.add_(parameter - self._start[name], alpha=self._mu)
                parameter.grad.mul_(self._kept[name])
