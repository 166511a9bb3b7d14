"""Train by `transformers.Trainer`, with an adapter as its checkpoint, a loss per token, and atomic checkpoints."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from hecompile.environment import without_launcher
from hecompile.errors import InputError, NotFiniteError, VerificationError
from hecompile.files import reason_of
from hecompile.polynomial.domains import DomainViolation
from hecompile.runtime.client.bounds import BoundedModel, read_gains, write_gains
from hecompile.runtime.client.range_terms import RangeLossModel, WatchedOutput
from hecompile.runtime.model.adapter import AdapterModel, load_adapter, save_adapter
from hecompile.runtime.model.data import Examples, PadToBucket
from hecompile.runtime.model.divergence import (
    DomainModel,
    divergence_error,
    require_finite_gradients,
    require_finite_loss,
)
from hecompile.runtime.model.evaluation import evaluate
from hecompile.runtime.model.head import scored_positions
from hecompile.runtime.recipes.training import RangeLossSection, TrainingSection
from hecompile.runtime.training.metrics import METRICS_FILE, MetricsWriter, ProgressBar
from hecompile.runtime.training.micro_batches import MicroBatches, cut

GAINS_FILE = "gains.json"
SETTINGS_FILE = "training_settings.json"
_STAGING = ".checkpoint-partial"


def training_arguments(section: TrainingSection) -> TrainingArguments:
    """Return the recipe's settings as `TrainingArguments`: on the CPU, reporting to nobody, with each step's loss."""
    given = section.model_dump(
        exclude={
            "overwrite_output_dir", "warmup_ratio", "data_seed", "logging_steps", "per_device_eval_batch_size",
            "gradient_accumulation_steps", "micro_batches_in_flight",
        }
    )  # fmt: skip
    # The trainer sees whole steps; `AdapterTrainer.training_step` cuts them into micro-batches, so that several may be in
    # flight. The data order, the steps of an epoch and the steps of a checkpoint are those of accumulation.
    given["per_device_train_batch_size"] = section.examples_per_step
    given["eval_strategy"] = section.eval_strategy or ("steps" if section.eval_steps else "no")
    given["output_dir"] = str(section.output_dir)
    given["warmup_steps"] = section.warmup_steps or section.warmup_ratio
    arguments = TrainingArguments(
        **given,
        data_seed=section.order_seed,
        logging_steps=1,  # the metrics hold every step; the recipe's logging_steps is for the progress bar
        logging_nan_inf_filter=False,
        optim="adamw_torch",
        use_cpu=True,
        remove_unused_columns=False,
        report_to="none",
    )
    # TrainingArguments adds a reporter by itself where it finds one in its surroundings.
    arguments.report_to = []
    return arguments


class AdapterTrainer(Trainer):
    """Train the adapter of an `AdapterModel`; the training data come in the order that `data_seed` gives.

    `settings` goes into each checkpoint as `SETTINGS_FILE`, so that a resumed run can be compared with it. `evaluation` is
    the step of the last evaluation, and what it gave.
    """

    _one_draw = False
    _keeps_gains = True

    def __init__(
        self,
        model: AdapterModel,
        section: TrainingSection,
        settings: Mapping[str, Any],
        train_examples: Examples,
        heldout_examples: Examples | None,
        collate: PadToBucket,
        range_loss: RangeLossSection | None = None,
    ) -> None:
        in_flight = section.micro_batches_in_flight if model.concurrent else 1
        self._micro_batches = MicroBatches(in_flight, one_draw=self._one_draw)
        self.evaluation: tuple[int, dict[str, float]] | None = None
        with without_launcher():  # accelerate's state is made here, for good
            super().__init__(
                model=cast("torch.nn.Module", model),
                args=training_arguments(section),
                data_collator=collate,
                train_dataset=train_examples,
                eval_dataset=heldout_examples,
                callbacks=[self._writer(section.output_dir)],
            )
        self._adapter_model = model
        self._settings = settings
        self._heldout = heldout_examples
        self._range_loss = range_loss
        if isinstance(model, RangeLossModel):
            model.with_range_terms = range_loss is not None
        self._collate = collate
        self._eval_batch_size = section.per_device_eval_batch_size
        self._rows = section.per_device_train_batch_size
        for printing in (PrinterCallback, ProgressCallback):
            self.remove_callback(printing)
        self._bar = None if section.disable_tqdm else ProgressBar(section.logging_steps)
        if self._bar is not None:
            self.add_callback(self._bar)

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Add the gradients of the step's loss to the adapter's, and return that loss.

        It is the mean over all unmasked labels of the step, however these are spread over its micro-batches, with the terms
        of `range_loss` where there are any.

        Raises:
            NotFiniteError: a loss or a gradient is not finite. Neither adapter nor optimizer was changed.
            VerificationError: a worker's reply was wrong.
        """
        model.train()
        step, random = f"step {self.state.global_step + 1}", torch.get_rng_state()
        try:
            loss = self._take_gradients(inputs)
            require_finite_loss(loss)
            # Before the update: what is refused here never reaches the adapter or the optimizer.
            require_finite_gradients(self._adapter_model.adapter_state())
        except VerificationError as error:
            raise VerificationError(f"{step}: {error}") from None
        except NotFiniteError as error:
            torch.set_rng_state(random)  # each micro-batch then has the same dropout again
            outside = self._outside_domains(cut(inputs, self._rows))
            raise divergence_error(f"{step}: {error}; the step was not taken", outside) from None
        return loss

    def _outside_domains(self, micro_batches: list[dict[str, torch.Tensor]]) -> tuple[DomainViolation, ...]:
        """Find what leaves the domains of the model's polynomials, in the first micro-batch where something does."""
        model = self._adapter_model
        if not isinstance(model, DomainModel):
            return ()

        def look(micro_batch: Mapping[str, torch.Tensor], generator: torch.Generator) -> tuple[DomainViolation, ...]:
            return model.outside_domains(**micro_batch, generator=generator)

        return next((outside for outside in self._micro_batches.map(look, micro_batches) if outside), ())

    def _take_gradients(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        count = int(scored_positions(inputs["labels"]).sum())

        def share(micro_batch: Mapping[str, torch.Tensor], generator: torch.Generator) -> torch.Tensor:
            output = self._adapter_model(**micro_batch, num_items_in_batch=count, generator=generator)
            loss = output.loss
            assert loss is not None
            require_finite_loss(loss)
            if self._range_loss is not None and isinstance(output, WatchedOutput) and output.ranges is not None:
                part = int(scored_positions(micro_batch["labels"]).sum()) / count
                loss = loss + part * output.ranges.loss(self._range_loss.alpha, self._range_loss.beta)
            return loss

        return self._micro_batches.run(self._adapter_model, cut(inputs, self._rows), share)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """See `transformers.Trainer.train`; the threads of the micro-batches end with it."""
        try:
            with without_launcher():
                return super().train(*args, **kwargs)
        finally:
            self._micro_batches.close()
            if self._bar is not None:
                self._bar.close()

    def _writer(self, output_dir: Path) -> TrainerCallback:
        """Make what writes the metrics."""
        return MetricsWriter(self._figures, output_dir / METRICS_FILE)

    def _figures(self) -> dict[str, float]:
        return self._adapter_model.stats() | {"overlapped_seconds": self._micro_batches.overlapped_seconds}

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Name all trainable parameters: each is a matrix of LoRA, whatever the model's own names may look like."""
        return [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return and log the held-out loss per token and the exact match, see `hecompile.runtime.model.evaluation`."""
        started = time.perf_counter()
        examples = self._heldout if eval_dataset is None else eval_dataset
        assert examples is not None
        result = evaluate(self._adapter_model, examples, self._collate.pad_token_id, self._eval_batch_size)
        metrics = {f"{metric_key_prefix}_loss": result.loss}
        if result.exact_match is not None:
            metrics[f"{metric_key_prefix}_exact_match"] = result.exact_match
        self.evaluation = self.state.global_step, dict(metrics)
        metrics[f"{metric_key_prefix}_seconds"] = time.perf_counter() - started
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the adapter as a checkpoint's model: the base is frozen, and on the client not even present."""
        self._save_to(output_dir)

    def _save_to(self, output_dir: str | None) -> Path:
        directory = save_adapter(self._adapter_model, output_dir or cast("str", self.args.output_dir))
        (directory / SETTINGS_FILE).write_text(json.dumps(self._settings, indent=2) + "\n", encoding="utf-8")
        return directory

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        load_adapter(self._adapter_model, resume_from_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save the bounds of products beside both, for the run that goes on: they have followed the data."""
        super()._save_optimizer_and_scheduler(output_dir)
        gains = self._adapter_model.gains if isinstance(self._adapter_model, BoundedModel) else {}
        if self._keeps_gains and gains:  # there are none without encryption
            write_gains(Path(output_dir) / GAINS_FILE, gains)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load both, and go on at the learning rate and the intervals that this run has at this step.

        The optimizer's state has the next rate of the run that made it, often 0 where that was shorter. The trainer's
        state has that run's `save_steps` and `eval_steps`.
        """
        super()._load_optimizer_and_scheduler(checkpoint)
        gains = None if checkpoint is None else Path(checkpoint) / GAINS_FILE
        if gains is not None and gains.is_file() and isinstance(self._adapter_model, BoundedModel):
            self._adapter_model.lower_gains(read_gains(gains))
        schedule = self.lr_scheduler
        if checkpoint is None or not isinstance(schedule, LambdaLR):
            return
        self.state.compute_steps(self.args, self.state.max_steps)
        schedule._last_lr = []
        groups = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
        for group, rate, factor in groups:
            group["lr"] = rate * factor(schedule.last_epoch)
            schedule._last_lr.append(group["lr"])

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Let the trainer write the checkpoint into a staging folder, then rename it: a kill leaves no partial one."""
        output_dir = Path(cast("str", self.args.output_dir))
        staging = output_dir / _STAGING
        shutil.rmtree(staging, ignore_errors=True)
        final = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self.args.output_dir = str(staging)
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # the last two: how torch and safetensors report it
            shutil.rmtree(staging, ignore_errors=True)
            reason = reason_of(error) if isinstance(error, OSError) else f"is the disk full? ({str(error).splitlines()[0]})"
            earlier = any(output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
            advice = "There is no earlier one: make room and start again"
            if earlier:
                advice = "The earlier ones are whole: make room and go on with --resume"
            raise InputError(
                f"the checkpoint of step {self.state.global_step} cannot be written to {output_dir}: {reason}. {advice}"
            ) from error
        finally:
            self.args.output_dir = str(output_dir)
        (staging / final.name).rename(final)
        staging.rmdir()
        rotate_checkpoints(str(output_dir), save_total_limit=self.args.save_total_limit)
