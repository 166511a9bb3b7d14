"""Define the training recipe: a YAML file with the names of PEFT and of transformers' `TrainingArguments`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import peft
from pydantic import Field, ValidationInfo, field_validator, model_validator

from hecompile.errors import InputError
from hecompile.polynomial.names import current_name
from hecompile.runtime.recipes.document import load_document, resolve_paths
from hecompile.runtime.recipes.prefix import PrefixCacheSection
from hecompile.runtime.recipes.privacy import PrivacySection
from hecompile.runtime.recipes.section import Positive, Section
from hecompile.runtime.recipes.workplace import Workplace, resolve_worker

_PATH_KEYS = (
    ("model",),
    ("worker_bundle",),
    ("data", "train_file"),
    ("data", "validation_file"),
    ("training", "output_dir"),
    ("privacy", "ledger"),
    ("prefix_cache", "directory"),
    *(("connection", name) for name in ("authority", "certificate", "key", "token")),
)
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class DataSection(Section):
    """Name the JSONL files (see `hecompile.runtime.model.data`).

    `max_length` counts tokens with bos and eos, and can only be under the largest sequence bucket of the model.
    """

    train_file: Path
    validation_file: Path | None = None
    max_length: Annotated[int, Field(ge=2)] | None = None


class LoraSection(Section):
    """Repeat the LoRA settings, which are fixed when the model is exported; the recipe is then checked against the model."""

    r: Positive | None = None
    lora_alpha: float | None = None
    lora_dropout: Fraction | None = None
    target_modules: list[str] | None = None
    layers_to_transform: list[Annotated[int, Field(ge=0)]] | None = None
    layers_pattern: list[str] | None = None


class TrainingSection(Section):
    """Set up the training loop.

    Names, meanings and defaults are those of `transformers.TrainingArguments`, except that

    * `warmup_ratio` is the older name of a `warmup_steps` below 1;
    * `logging_steps` is only how often the progress bar shows the loss (the metrics file has every step), default 1;
    * `eval_steps` is enough to evaluate every so many steps, and the default evaluation batch is what the model takes;
    * `overwrite_output_dir` replaces the run that `output_dir` holds; without it such a run is an error;
    * `micro_batches_in_flight` is how many of a step's `gradient_accumulation_steps` micro-batches are computed at once:
      while one waits for the worker, another does client work. The result does not depend on it. Each micro-batch in
      flight holds its activations, so that memory grows with it; tokens are encrypted in blocks of the plan's ring_dim, so
      a micro-batch should have about that many tokens or a multiple.
    """

    output_dir: Path
    overwrite_output_dir: bool = False
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    max_steps: int = -1
    num_train_epochs: Annotated[float, Field(gt=0)] = 3.0
    per_device_train_batch_size: Positive = 8
    per_device_eval_batch_size: Positive | None = None
    gradient_accumulation_steps: Positive = 1
    micro_batches_in_flight: Positive = 1
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = "linear"
    warmup_steps: Annotated[float, Field(ge=0)] = 0
    warmup_ratio: Fraction = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.999
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    data_seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    logging_steps: Positive = 1
    disable_tqdm: bool = False
    save_strategy: Literal["no", "steps", "epoch"] = "steps"
    save_steps: Positive = 500
    save_total_limit: Positive | None = None
    eval_strategy: Literal["no", "steps", "epoch"] | None = None
    eval_steps: Positive | None = None
    eval_on_start: bool = False

    @field_validator("save_strategy", "eval_strategy", mode="before")
    @classmethod
    def _yaml_no(cls, value: object) -> object:
        return "no" if value is False else value  # YAML 1.1 reads a bare `no` as false

    @field_validator("max_steps")
    @classmethod
    def _steps(cls, value: int) -> int:
        if value < 1 and value != -1:
            raise ValueError("must be at least 1, or -1 to train for num_train_epochs")
        return value

    @field_validator("warmup_steps")
    @classmethod
    def _warmup_steps(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError("must be a whole number of steps, or a fraction of all steps below 1")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> TrainingSection:
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("give warmup_steps or warmup_ratio, not both")
        if self.micro_batches_in_flight > self.gradient_accumulation_steps:
            raise ValueError(
                f"micro_batches_in_flight is {self.micro_batches_in_flight}, but a step has only "
                f"{self.gradient_accumulation_steps} (gradient_accumulation_steps); lower per_device_train_batch_size and "
                f"raise gradient_accumulation_steps to cut it into more"
            )
        if self.eval_steps is not None and self.eval_strategy in ("no", "epoch"):
            raise ValueError(f"eval_steps has no meaning with eval_strategy: {self.eval_strategy}; drop one of them")
        if self.eval_strategy == "steps" and self.eval_steps is None:
            raise ValueError("eval_strategy: steps needs eval_steps")
        return self

    @property
    def order_seed(self) -> int:
        """Return the seed of the data order: `data_seed`, or `seed` where it is not given."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def examples_per_step(self) -> int:
        """Return how many examples an optimizer step takes, over all of its micro-batches."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def evaluates(self) -> bool:
        """Say whether the recipe wants a held-out evaluation before or during the training."""
        return self.eval_on_start or self.eval_steps is not None or self.eval_strategy == "epoch"


class RangeLossSection(Section):
    """Weigh the terms of the range loss: α·L_range + β·L_var + L (Zimerman et al., Power-Softmax, arXiv 2410.09457).

    L_range is of scores, divisors and activation inputs, L_var of variances. Zero turns a term off. In `metrics.jsonl` the
    loss is the sum.
    """

    alpha: Annotated[float, Field(ge=0)] = 1.0
    beta: Annotated[float, Field(ge=0)] = 1.0


class Recipe(Workplace):
    """Describe one training run, where its `Workplace` says.

    `range_loss` keeps what goes into the polynomials of a plan in their domains (`hecompile.runtime.client.range_terms`);
    there is none by default.
    """

    command = "train"
    data: DataSection
    training: TrainingSection
    lora: LoraSection | None = None
    privacy: PrivacySection | None = None
    prefix_cache: PrefixCacheSection | None = None
    attention: Literal["exact", "power", "gaussian_kernel", "chebyshev"] | None = None
    norm: Literal["exact", "polynomial"] | None = None
    activation: Literal["exact", "polynomial", "composed", "quantized"] | None = None
    range_loss: RangeLossSection | None = None

    @field_validator("prefix_cache", mode="before")
    @classmethod
    def _size_alone(cls, value: object) -> object:
        return {"size": value} if isinstance(value, (str, int)) else value

    @field_validator("attention", "norm", "activation", mode="before")
    @classmethod
    def _current_name(cls, name: Any, info: ValidationInfo) -> Any:
        return current_name(str(info.field_name), name)

    @property
    def requests_in_flight(self) -> int:
        return self.training.micro_batches_in_flight

    @model_validator(mode="after")
    def _evaluable(self) -> Recipe:
        if self.training.evaluates and self.data.validation_file is None:
            raise ValueError("the training section asks for evaluation; give data.validation_file")
        if self.range_loss is not None and self.prefix_cache is not None:
            raise ValueError("range_loss looks into the layers that prefix_cache computes once: drop one of them")
        if self.range_loss is not None and self.privacy is not None:
            raise ValueError("range_loss is a term of a whole batch, and privacy clips gradients of examples: drop one")
        return self


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load a training recipe, see `hecompile.runtime.recipes.document.load_document`."""
    return load_document(path, overrides, Recipe, _resolve)


def check_lora(section: LoraSection | None, config: peft.LoraConfig) -> None:
    """Raise `InputError` if a recipe names LoRA settings that differ from those the model was exported with."""
    for name, wanted in section.model_dump(exclude_none=True).items() if section else ():
        actual = getattr(config, name)
        several = isinstance(wanted, list) and actual is not None
        if (set(wanted) != set(actual)) if several else (wanted != actual):
            shown = sorted(actual) if several else actual
            raise InputError(
                f"recipe: lora.{name} is {wanted} but the model was exported with {shown}; "
                f"drop it from the recipe or export the model again"
            )


def _resolve(document: dict[str, Any], directory: Path) -> None:
    resolve_paths(document, _PATH_KEYS, directory)
    resolve_worker(document, directory)
