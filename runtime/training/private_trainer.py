"""Train in private steps: DP-SGD on LoRA's matrices (Abadi et al., arXiv 1607.00133), or DP-LoRA as published.

    batch: a Poisson sample     g_i: gradient of example i's mean loss     clip: min(1, C / ‖g_i‖) over all matrices together
    step:  (Σ clip(g_i) + N(0, z²C²)) / (expected batch size)

The release is entered in the ledger before noise is drawn. What the optimizer, the schedule and the checkpoints make of it
afterwards costs nothing more. No file of a checkpoint, nor metrics.jsonl, has anything of the data that did not come by
that way (docs/privacy.md has the list): neither losses nor times, and no random state that counts the examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from hecompile.runtime.model.data import Examples, PadToBucket
from hecompile.runtime.model.divergence import require_finite_loss
from hecompile.runtime.model.per_example import require_per_example
from hecompile.runtime.privacy.clipping import add_noise, clipped_sum, in_units
from hecompile.runtime.privacy.promise import PrivateSteps
from hecompile.runtime.privacy.sampling import PoissonBatches
from hecompile.runtime.training.metrics import RELEASED, PrivateMetricsWriter, released
from hecompile.runtime.training.micro_batches import cut
from hecompile.runtime.training.trainer import AdapterTrainer


class PadPossiblyEmpty(PadToBucket):
    """Collate as `PadToBucket`; no items make tensors [0, smallest bucket], and no numbers."""

    def __call__(self, items: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        if items:
            return super().__call__(items)
        empty = torch.zeros(0, min(self.sequence_buckets), dtype=torch.int64)
        batch = {"input_ids": empty, "attention_mask": empty, "labels": empty}
        return batch | {"examples": empty[:, 0]} if self.with_examples else batch


class PrivateTrainer(AdapterTrainer):
    """Train as `AdapterTrainer`, with steps made private as `private` says.

    The order of the data is secret and not to be repeated: `data_seed` has no meaning here. The loss, which is the sample's
    own without noise, is not logged.
    """

    _one_draw = True  # the generator's state is in every checkpoint
    _keeps_gains = False  # which are of the data, without noise

    def __init__(self, private: PrivateSteps, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._private = private
        self._model = require_per_example(self._adapter_model) if private.section.mode == "strict" else None
        collate = self._collate
        self.data_collator = PadPossiblyEmpty(collate.sequence_buckets, collate.pad_token_id, collate.with_examples)
        self.args.max_grad_norm = 0.0  # each example is clipped already, and the noise is not to be

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Draw Poisson samples; as many in an epoch as it has batches without privacy."""
        assert isinstance(self.train_dataset, Examples)
        examples, expected = len(self.train_dataset), self._private.expected_batch
        batches = PoissonBatches(examples, expected, -(-examples // expected))
        loader = DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)
        return cast("DataLoader[Any]", self.accelerator.prepare(loader))

    def _take_gradients(self, inputs: Mapping[str, Tensor]) -> Tensor:
        if self._model is None:
            return self._as_published(inputs)
        model, grid = self._model, self._private.grid

        def share(batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, int, dict[str, Tensor]]:
            examples = model.per_example_gradients(**batch, generator=generator)
            require_finite_loss(examples.loss)
            return examples.loss, int(examples.tokens.sum()), clipped_sum(examples.of_means(), grid)

        loss, tokens = torch.zeros(()), 0
        parameters = self._adapter_model.adapter_state()
        sums = {name: torch.zeros(value.shape, dtype=torch.int64) for name, value in parameters.items()}
        for part, count, clipped in self._micro_batches.map(share, cut(inputs, self._rows)):
            loss, tokens = loss + part, tokens + count
            for name, value in clipped.items():
                sums[name] += value
        self._private.spend(self.state.global_step + 1)
        noisy = in_units(add_noise(sums, self._private.noise_multiplier), grid, self._private.expected_batch)
        for name, parameter in parameters.items():
            parameter.grad = noisy[name]
        return loss / max(tokens, 1)

    def _as_published(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Take the gradient of the batch, clipped and noised for all A together and for all B together."""
        loss = super()._take_gradients(inputs)
        parameters, grid = self._adapter_model.adapter_state(), self._private.grid
        gradients = {
            name: torch.zeros_like(value) if value.grad is None else value.grad for name, value in parameters.items()
        }
        clipped = {
            kind: clipped_sum({name: value[None] for name, value in gradients.items() if kind in name}, grid)
            for kind in (".lora_A.", ".lora_B.")
        }
        self._private.spend(self.state.global_step + 1)
        for part in clipped.values():
            for name, value in in_units(add_noise(part, self._private.noise_multiplier), grid).items():
                parameters[name].grad = value
        return loss

    def _writer(self, output_dir: Path) -> TrainerCallback:
        return PrivateMetricsWriter(output_dir)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log what may be written of a step, and evaluations, which are of other data."""
        kept = {name: value for name, value in logs.items() if name in RELEASED or name.startswith("eval_")}
        super().log(kept, start_time)

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Return 0: the trainer keeps the sum, which would count the tokens of the samples."""
        return 0

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        # Also what the checkpoint of an earlier version, from which the run goes on, had in its state.
        self.state.log_history = [released(record) for record in self.state.log_history]
        self.state.total_flos = 0
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        directory = self._save_to(output_dir)
        self._private.copy_ledger(directory)
