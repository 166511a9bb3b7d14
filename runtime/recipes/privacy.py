"""Define the `privacy:` section of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from hecompile.runtime.recipes.section import Section


class PrivacySection(Section):
    """Promise (ε, δ)-differential privacy: a bound on what the adapter tells of any one example (line) of `data.train_file`.

    * `epsilon` with `delta`: the noise is calibrated so that all steps of the run, with everything that the ledger has from
      earlier ones, stay within. A run for which those left too little to learn anything is refused.
    * `noise_multiplier` with `delta`: that noise, and ε is reported.
    * All three: that noise, however much, and a run that would exceed epsilon is refused.
    * `noise_multiplier` is the noise's standard deviation in units of `max_grad_norm`; 0 is for experiments and promises
      nothing.
    * `max_grad_norm` (strict: of an example's gradient over all LoRA matrices together; `training.max_grad_norm` is not
      used).
    * `ledger`: where the record of what was spent is kept; by default beside the training file, so that every run on it,
      with whatever output directory, spends from one budget.
    * `mode: paper` is DP-LoRA as published (Liu et al., arXiv 2312.17493), for comparison: the gradient of the batch,
      clipped for A and for B each, its noise from the paper's formula where `epsilon` is given. That is no bound on what
      is spent; the ε that it really gives is reported beside it.
    """

    mode: Literal["strict", "paper"] = "strict"
    epsilon: Annotated[float, Field(gt=0)] | None = None
    delta: Annotated[float, Field(gt=0, lt=1)]
    noise_multiplier: Annotated[float, Field(ge=0)] | None = None
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    ledger: Path | None = None

    @model_validator(mode="after")
    def _determined(self) -> PrivacySection:
        if self.epsilon is None and self.noise_multiplier is None:
            raise ValueError("give epsilon, and the noise is calibrated, or noise_multiplier, and epsilon is reported")
        if self.mode == "paper" and self.epsilon is not None and self.noise_multiplier is not None:
            raise ValueError(
                "mode: paper takes epsilon (its formula then gives the noise) or noise_multiplier, not both"
            )
        return self

    def ledger_of(self, train_file: Path) -> Path:
        """Return the path of the ledger."""
        return self.ledger or train_file.with_name(f"{train_file.name}.ledger")
