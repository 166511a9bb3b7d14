"""What an owner does between two messages: train the adapter on its own text, within the mask, from the global adapter.

The optimizer is fresh in every round, as in FedAvg (McMahan et al., AISTATS 2017). FedProx (Li et al., MLSys 2020) adds
mu/2·‖w - w_global‖² to the loss; its gradient mu·(w - w_global) joins the others after these were clipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hecompile.runtime.federation.protocol.layout import Layout
from hecompile.runtime.federation.protocol.participant import LocalUpdate
from hecompile.runtime.federation.protocol.pruning import prune_client
from hecompile.runtime.federation.protocol.settings import FederationSection, RoundHeader
from hecompile.runtime.model.adapter import AdapterModel
from hecompile.runtime.model.data import Examples, PadToBucket, eos_and_pad
from hecompile.runtime.privacy.promise import PrivateSteps
from hecompile.runtime.recipes.training import TrainingSection
from hecompile.runtime.training.private_trainer import PrivateTrainer
from hecompile.runtime.training.trainer import AdapterTrainer


class LocalTrainer:
    """Trains `model`'s adapter for one round at a time; it is a `client.Train`.

    Args:
        section: of one round. Its seed grows with the round, and by `index` from owner to owner; its learning rate falls
            as the federation says.
        output_dir: gets the metrics of every round.
        private: makes every step differentially private for each example (`hecompile.runtime.privacy`); what is sent is
        made of such
            steps alone, so that the promise holds against the server and the other owners, whatever the sum hides besides.
    """

    def __init__(
        self,
        model: AdapterModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Examples,
        section: TrainingSection,
        output_dir: Path,
        index: int = 0,
        private: PrivateSteps | None = None,
    ) -> None:
        self.model = model
        self.layout = Layout.of(model.adapter_state())
        self._examples = examples
        self._section = section
        self._output_dir = output_dir
        self._index = index
        self.private = private
        self._collate = PadToBucket(model.sequence_buckets, eos_and_pad(tokenizer)[1])

    def __call__(self, header: RoundHeader, adapter: NDArray[np.float32], mask: NDArray[np.bool_]) -> LocalUpdate:
        """One round."""
        section = header.agreement.section
        after = self.train(header.number, adapter, mask, section)
        if section.pruning is not None and section.pruning.mask == "per_client":
            after = prune_client(self.layout, after, header.rate)
        return LocalUpdate(np.where(mask, after - adapter, np.float32(0)), len(self._examples))

    def train(
        self,
        number: int,
        adapter: NDArray[np.float32],
        mask: NDArray[np.bool_],
        federation: FederationSection,
        steps: int | None = None,
    ) -> NDArray[np.float32]:
        """The adapter after the steps of one round (or `steps`) from `adapter`, float32 `[size]`; unchanged where the
        mask is false."""
        start = self.layout.unflatten(adapter)
        self.model.load_adapter_state(start)
        changes: dict[str, Any] = {
            "output_dir": self._output_dir / f"round-{number}",
            "seed": self._section.seed + 1000 * number + self._index,
            "data_seed": None,
            "save_strategy": "no",
            "disable_tqdm": True,
            "learning_rate": self._section.learning_rate * federation.decay(number),
        }
        if steps is not None:
            changes["max_steps"] = steps
        section = self._section.model_copy(update=changes)
        settings: dict[str, Any] = {}
        parts = (self.model, section, settings, self._examples, None, self._collate)
        trainer = AdapterTrainer(*parts) if self.private is None else PrivateTrainer(self.private, *parts)
        mu = federation.mu if federation.algorithm == "fedprox" else 0.0
        kept = self.layout.unflatten(mask.astype(np.float32))
        trainer.add_callback(_Constraints(self.model, start, kept, mu))
        trainer.train()
        return np.where(mask, self.layout.flatten(self.model.adapter_state()), adapter)


class _Constraints(TrainerCallback):
    """Changes the gradients between clipping and update: the proximal term, then the mask."""

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
