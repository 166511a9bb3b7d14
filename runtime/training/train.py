"""Run a training from a recipe: check everything, then train, then save the adapter.

The output directory then holds `metrics.jsonl`, `checkpoint-N/` (the PEFT adapter with the states of optimizer,
schedule and random generators, and the settings) and `adapter/`, after a private run `evaluations.jsonl` too.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hecompile.errors import InputError
from hecompile.files import only_writer, reason_of
from hecompile.runtime.client.functions import check_functions
from hecompile.runtime.model.adapter import AdapterModel, load_adapter, save_adapter
from hecompile.runtime.model.data import Examples, PadToBucket, eos_and_pad, load_examples, smallest_bucket
from hecompile.runtime.model.prefix import PrefixModel
from hecompile.runtime.privacy.promise import PrivateRun, PrivateSteps, check_same_promise, private_steps
from hecompile.runtime.recipes.training import Recipe, TrainingSection, check_lora
from hecompile.runtime.training.freed_memory import freed_memory_kept
from hecompile.runtime.training.metrics import (
    EVALUATIONS_FILE,
    METRICS_FILE,
    forget_after,
    keep_released,
    read_metrics,
)
from hecompile.runtime.training.private_trainer import PrivateTrainer
from hecompile.runtime.training.resume import check_resumable, checkpoint_to_resume
from hecompile.runtime.training.trainer import AdapterTrainer

ADAPTER_DIR = "adapter"


@dataclass(frozen=True)
class TrainingResult:
    """Report where the PEFT adapter is, how many optimizer steps it has had, and the figures at the end.

    `metrics` has `loss` of the last step, and `eval_loss` and `eval_exact_match` if there is a validation file. `privacy`
    says what was promised and spent, where the recipe has a privacy section; then there is no `loss`.
    """

    adapter_dir: Path
    steps: int
    metrics: dict[str, float]
    privacy: str | None = None


@dataclass(frozen=True)
class _Data:
    """Hold a run's tokenised examples, and what makes batches of them."""

    train: Examples
    heldout: Examples | None
    collate: PadToBucket

    @property
    def lengths(self) -> list[int]:
        """Count the tokens of all examples."""
        return self.train.lengths + ([] if self.heldout is None else self.heldout.lengths)


@dataclass(frozen=True)
class _Start:
    """Say where a run begins: at step 0, or at the `step` of a `checkpoint`. `steps` are left from there."""

    checkpoint: Path | None
    step: int
    steps: int


def check_training(model: AdapterModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    """Raise InputError where the recipe or its data do not fit the model; nothing is written or removed."""
    _checked_data(model, tokenizer, recipe)


def run_training(
    model: AdapterModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    resume: bool | str | Path = False,
) -> TrainingResult:
    """Train `model`'s adapter in place as `recipe` says and save it in `output_dir/adapter`.

    `resume` is a checkpoint directory, or True for the last one in the output directory; the run then goes on exactly
    as if it had not stopped, data order and dropout included. Meanwhile the process keeps freed memory
    (`hecompile.runtime.training.freed_memory`).

    Raises:
        InputError: the recipe, the data or the checkpoint do not fit the model. Nothing was written.
        NotFiniteError: a loss, a gradient or a value to encrypt is not finite; it names what left the domains of a
            polynomial plan. The checkpoints saved before that are kept.
    """
    data = _checked_data(model, tokenizer, recipe)
    with only_writer(recipe.training.output_dir, f"training.output_dir {recipe.training.output_dir}", folder=True):
        return _run(model, recipe, data, resume)


def _run(model: AdapterModel, recipe: Recipe, data: _Data, resume: bool | str | Path) -> TrainingResult:
    """Run the training whose output directory nobody else writes to."""
    settings = _settings(model, recipe, data.train)
    start = _find_start(recipe, settings, len(data.train), resume)
    with _promise(recipe, len(data.train), start) as private, _kept_prefix(model, recipe, data) as collate:
        if start.checkpoint is not None:
            load_adapter(model, start.checkpoint)  # one that does not fit is refused before anything is written
        section = _prepare_output_dir(recipe, start)
        parts = (model, section, settings, data.train, data.heldout, collate, recipe.range_loss)
        trainer = AdapterTrainer(*parts) if private is None else PrivateTrainer(private, *parts)
        with freed_memory_kept():
            trainer.train(resume_from_checkpoint=str(start.checkpoint) if start.checkpoint else None)
        adapter_dir = save_adapter(model, section.output_dir / ADAPTER_DIR)
        metrics = _final_metrics(trainer, section.output_dir)
        described = None if private is None else private.describe()
    return TrainingResult(adapter_dir, trainer.state.global_step, metrics, described)


def _checked_data(model: AdapterModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> _Data:
    check_lora(recipe.lora, model.peft_config)
    check_functions(recipe, model)
    data = _load_data(model, tokenizer, recipe)
    _check_batches_fit(model, recipe, data)
    if recipe.prefix_cache is not None and isinstance(model, PrefixModel):
        model.prefix.check(recipe.prefix_cache, data.lengths)
    return data


@contextmanager
def _kept_prefix(model: AdapterModel, recipe: Recipe, data: _Data) -> Iterator[PadToBucket]:
    """Keep what the recipe wants kept; give what makes batches of the data. A model that sends nothing keeps nothing."""
    if recipe.prefix_cache is None or not isinstance(model, PrefixModel):
        yield data.collate
        return
    with model.prefix.keep(recipe.prefix_cache, data.lengths):
        yield replace(data.collate, with_examples=True)


def _load_data(model: AdapterModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> _Data:
    def load(path: Path) -> Examples:
        return load_examples(path, tokenizer, model.sequence_buckets, recipe.data.max_length)

    train = load(recipe.data.train_file)
    heldout = None if recipe.data.validation_file is None else load(recipe.data.validation_file)
    return _Data(train, heldout, PadToBucket(model.sequence_buckets, eos_and_pad(tokenizer)[1]))


def _settings(model: AdapterModel, recipe: Recipe, train: Examples) -> dict[str, Any]:
    """Collect what each checkpoint records, so that a resumed run can be compared with it."""
    section = recipe.training
    settings = section.model_dump(mode="json") | {"data_seed": section.order_seed, "train_examples": len(train)}
    settings["model"] = model.digest
    if recipe.privacy is None:  # else the ledger knows the data, and a checkpoint should tell nothing of them
        settings["train_data"] = train.digest
    if recipe.range_loss is not None:
        settings["range_loss"] = recipe.range_loss.model_dump(mode="json")
    return settings


def _find_start(recipe: Recipe, settings: dict[str, Any], examples: int, resume: bool | str | Path) -> _Start:
    total = _total_steps(recipe.training, examples)
    if not resume:
        return _Start(None, 0, total)
    output_dir = recipe.training.output_dir
    checkpoint = checkpoint_to_resume(output_dir, resume)
    step = check_resumable(checkpoint, output_dir, settings, total)
    check_same_promise(checkpoint, recipe.privacy)
    return _Start(checkpoint, step, total - step)


def _promise(recipe: Recipe, examples: int, start: _Start) -> AbstractContextManager[PrivateSteps | None]:
    if recipe.privacy is None:
        return nullcontext()
    batch = recipe.training.examples_per_step
    run = PrivateRun(recipe.data.train_file, examples, batch, start.steps, start.checkpoint)
    return private_steps(recipe.privacy, run)


def _prepare_output_dir(recipe: Recipe, start: _Start) -> TrainingSection:
    """Make the output directory this run's; return the settings for what is left of the run."""
    section = recipe.training
    if start.checkpoint is None:
        _claim_output_dir(section.output_dir, section.overwrite_output_dir)
        return section
    _make_output_dir(section.output_dir)
    for name in (METRICS_FILE, EVALUATIONS_FILE):
        forget_after(section.output_dir / name, start.step)  # the steps after it are taken again
    if recipe.privacy is not None:
        keep_released(section.output_dir / METRICS_FILE)
    return section.model_copy(update={"eval_on_start": False})  # this is not the start


def _final_metrics(trainer: AdapterTrainer, output_dir: Path) -> dict[str, float]:
    step = trainer.state.global_step
    if trainer.eval_dataset is not None and (trainer.evaluation is None or trainer.evaluation[0] != step):
        trainer.evaluate()
    records = [record for record in read_metrics(output_dir / METRICS_FILE) if record["step"] == step]
    if trainer.evaluation is not None:
        records.append(trainer.evaluation[1])
    return {
        key: record[key] for record in records for key in ("loss", "eval_loss", "eval_exact_match") if key in record
    }


def _total_steps(section: TrainingSection, examples: int) -> int:
    """Count the optimizer steps of the whole run, as `transformers.Trainer` does."""
    if section.max_steps > 0:
        return section.max_steps
    batches = math.ceil(examples / section.per_device_train_batch_size)
    return math.ceil(section.num_train_epochs * math.ceil(batches / section.gradient_accumulation_steps))


def _check_batches_fit(model: AdapterModel, recipe: Recipe, data: _Data) -> None:
    section = recipe.training
    sizes = [("per_device_train_batch_size", section.per_device_train_batch_size, data.train)]
    if data.heldout is not None:
        # Evaluation chooses its own batches where it may, but one example has to fit.
        sizes.append(("per_device_eval_batch_size", section.per_device_eval_batch_size or 1, data.heldout))
    for name, rows, examples in sizes:
        if rows > model.batch_size:
            raise InputError(
                f"recipe: training.{name} is {rows} but the model takes batches of at most {model.batch_size}; lower "
                f"it and raise gradient_accumulation_steps, or export the model for a larger batch"
            )
        width = smallest_bucket(examples.longest, model.sequence_buckets)
        if rows * width > model.max_batch_tokens:
            raise InputError(
                f"recipe: training.{name} is {rows} and the longest example needs {width} tokens with padding, so a "
                f"batch has {rows * width}, but the model takes at most {model.max_batch_tokens}; lower it"
            )


def _claim_output_dir(output_dir: Path, overwrite: bool) -> None:
    """Make sure that the output directory holds no other run; with `overwrite`, delete the files of one."""
    earlier = [path for path in output_dir.glob("checkpoint-*") if path.is_dir()]
    files = (METRICS_FILE, EVALUATIONS_FILE, ADAPTER_DIR)
    earlier += [output_dir / name for name in files if (output_dir / name).exists()]
    if earlier and not overwrite:
        raise InputError(
            f"training.output_dir {output_dir} already holds a run ({earlier[0].name}); resume it, choose another "
            f"directory, or set training.overwrite_output_dir=true to replace it"
        )
    _make_output_dir(output_dir)
    for path in earlier:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _make_output_dir(output_dir: Path) -> None:
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(output_dir, os.W_OK):
            raise PermissionError(errno.EACCES, "it cannot be written to")
    except OSError as error:
        raise InputError(f"training.output_dir {output_dir} cannot be used: {reason_of(error)}; name another") from None
