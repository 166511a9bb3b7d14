"""`transformers.Trainer` with an adapter as its checkpoint, a loss per token, and atomic checkpoints."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from hecompile.errors import HecompileError
from runtime.adapter import AdapterModel, load_adapter, save_adapter
from runtime.data import IGNORED, Examples, PadToBucket
from runtime.evaluation import evaluate
from runtime.metrics import METRICS_FILE, MetricsWriter, ProgressBar
from runtime.recipe import TrainingSection

SETTINGS_FILE = "training_settings.json"
_STAGING = ".checkpoint-partial"


def training_arguments(section: TrainingSection) -> TrainingArguments:
    """Return the recipe's settings as `TrainingArguments`: on the CPU, reporting to nobody, with each step's loss."""
    given = section.model_dump(
        exclude={"overwrite_output_dir", "warmup_ratio", "data_seed", "logging_steps", "per_device_eval_batch_size"}
    )
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
    """Trains the adapter of an `AdapterModel`; takes the training data in the order that `data_seed` gives.

    `settings` goes into each checkpoint as `SETTINGS_FILE`, so that a resumed run can be compared with it.
    """

    def __init__(
        self,
        model: AdapterModel,
        section: TrainingSection,
        settings: Mapping[str, Any],
        train_examples: Examples,
        heldout_examples: Examples | None,
        collate: PadToBucket,
    ) -> None:
        super().__init__(
            model=cast("torch.nn.Module", model),
            args=training_arguments(section),
            data_collator=collate,
            train_dataset=train_examples,
            eval_dataset=heldout_examples,
            callbacks=[MetricsWriter(model, section.output_dir / METRICS_FILE)],
        )
        self._adapter_model = model
        self._settings = settings
        self._heldout = heldout_examples
        self._collate = collate
        self._eval_batch_size = section.per_device_eval_batch_size
        # The trainer then counts the unmasked labels of all micro-batches of a step, which compute_loss divides by.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        for printing in (PrinterCallback, ProgressCallback):
            self.remove_callback(printing)
        if not section.disable_tqdm:
            self.add_callback(ProgressBar(section.logging_steps))

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return this micro-batch's share of the step's loss, so that the shares add up to the mean over all of the
        step's unmasked labels, however these are spread over its micro-batches."""
        outputs = model(**inputs)
        count = (inputs["labels"][:, 1:] != IGNORED).sum()
        loss = outputs.loss * (count / (count if num_items_in_batch is None else num_items_in_batch))
        if not torch.isfinite(loss):
            raise HecompileError(
                f"step {self.state.global_step + 1}: the loss is {loss.item()}; the step was not taken. "
                f"Try a lower learning_rate"
            )
        return (loss, outputs) if return_outputs else loss

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """All trainable parameters: each is a matrix of LoRA, whatever the model's own names may look like."""
        return [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return and log the held-out loss per token and the exact match, see `runtime.evaluation`."""
        started = time.perf_counter()
        examples = self._heldout if eval_dataset is None else eval_dataset
        assert examples is not None
        result = evaluate(self._adapter_model, examples, self._collate.pad_token_id, self._eval_batch_size)
        metrics = {f"{metric_key_prefix}_loss": result.loss}
        if result.exact_match is not None:
            metrics[f"{metric_key_prefix}_exact_match"] = result.exact_match
        metrics[f"{metric_key_prefix}_seconds"] = time.perf_counter() - started
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """A checkpoint's model is the adapter alone: the base is frozen, and on the client not even present."""
        directory = save_adapter(self._adapter_model, output_dir or cast("str", self.args.output_dir))
        (directory / SETTINGS_FILE).write_text(json.dumps(self._settings, indent=2) + "\n", encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        load_adapter(self._adapter_model, resume_from_checkpoint)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Let the trainer write the checkpoint into a staging folder, then rename it: a kill leaves no partial one."""
        output_dir = Path(cast("str", self.args.output_dir))
        staging = output_dir / _STAGING
        shutil.rmtree(staging, ignore_errors=True)
        final = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self.args.output_dir = str(staging)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = str(output_dir)
        (staging / final.name).rename(final)
        staging.rmdir()
        rotate_checkpoints(str(output_dir), save_total_limit=self.args.save_total_limit)
