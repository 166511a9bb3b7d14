"""Write training metrics, a JSON object per line and optimizer step, and a progress bar. Numbers only, never any text.

A private run writes no figure that its data have without noise: losses, times and counts of tokens tell of single examples.
What is left, `RELEASED`, follows from the noised gradients and the settings. Evaluations go into a file of their own, which
says that it is not to be handed on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hecompile.errors import InputError
from hecompile.files import reason_of, write_whole

METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
"""The evaluations of a private run."""
RELEASED = ("step", "epoch", "learning_rate", "grad_norm")
"""Figures of a private step that may be written: `grad_norm` is that of the gradient with its noise."""
_LOGGED = ("epoch", "loss", "learning_rate", "grad_norm")
_NOTICE = {
    "step": 0,
    "notice": "exact results on data.validation_file: the promise of differential privacy does not cover this file; keep it",
}


class MetricsWriter(TrainerCallback):
    """Append to `path` one record per optimizer step and one per evaluation; each is on disk when the step ends.

    A step's record has `step`, `epoch`, `loss` (nats, mean over the unmasked tokens of the step), `learning_rate`,
    `grad_norm` (before clipping), `seconds` (forward, backward and update, without evaluation and checkpoints) and what
    the step added to each figure of `figures()`. An evaluation's has `step`, `epoch` and `eval_*`. No figure is rounded.

    `seconds` is by the clock on the wall. With several micro-batches in flight the parts (`client_crypto_seconds`,
    `worker_seconds`, `wire_seconds` and the rest, which is the client's model) add up to `seconds` plus
    `overlapped_seconds`; each part then also holds what it waited for the others' use of the same cores.
    """

    def __init__(self, figures: Callable[[], Mapping[str, float]], path: Path) -> None:
        self._figures = figures
        self._path = path
        self._started = 0.0
        self._before: Mapping[str, float] = {}
        self._costs: dict[str, float] = {}

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._before = self._figures()
        self._started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        seconds = time.perf_counter() - self._started
        after = self._figures()
        self._costs = {"seconds": seconds} | {key: after[key] - self._before.get(key, 0.0) for key in after}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        if "loss" in logs:
            record = {key: float(logs[key]) for key in _LOGGED if key in logs} | self._costs
        elif "eval_loss" in logs:
            record = {key: value for key, value in logs.items() if key == "epoch" or key.startswith("eval_")}
        else:
            return  # the summary at the end, whose figures follow from the records
        _append(self._path, {"step": state.global_step} | record)


class PrivateMetricsWriter(TrainerCallback):
    """Append to METRICS_FILE in `directory` what is RELEASED of each step, and to EVALUATIONS_FILE each evaluation.

    The loss is not there, nor how long a step took: both depend on the sample, exactly.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        logs = {"step": state.global_step} | dict(logs or {})
        if "eval_loss" in logs:
            path = self._directory / EVALUATIONS_FILE
            if not path.exists():
                _append(path, _NOTICE)
            kept = {key: value for key, value in logs.items() if key in ("step", "epoch") or key.startswith("eval_")}
            _append(path, kept)
        elif "grad_norm" in logs:
            _append(self._directory / METRICS_FILE, released(logs))


def released(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a record may be written by a private run."""
    return {name: record[name] for name in RELEASED if name in record}


def _append(path: Path, record: Mapping[str, Any]) -> None:
    line = json.dumps(record, allow_nan=False) + "\n"
    with path.open("a", encoding="utf-8") as file:
        file.write(line)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics file; a last line that a kill left incomplete is dropped.

    Raises InputError for a file that cannot be read, and naming the line for a record that is none.
    """
    try:
        content = path.read_bytes() if path.is_file() else b""
    except OSError as error:
        raise InputError(f"cannot read the metrics {path}: {reason_of(error)}") from None
    return [_record(line, f"{path}, line {number}") for number, line in enumerate(content.split(b"\n")[:-1], start=1)]


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise InputError(f"{where}: damaged, not a record of a step; delete the line")
    return record


def forget_after(path: Path, step: int) -> None:
    """Drop the records of steps after `step`, which a run that resumes from there takes again."""
    if path.is_file():
        _rewrite(path, [record for record in read_metrics(path) if record["step"] <= step])


def keep_released(path: Path) -> None:
    """Drop from a private run's metrics file what an earlier version wrote there without noise."""
    if path.is_file():
        _rewrite(path, [released(record) for record in read_metrics(path) if "grad_norm" in record])


def _rewrite(path: Path, kept: list[dict[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(record, allow_nan=False) + "\n" for record in kept).encode())


class ProgressBar(ProgressCallback):
    """Show the trainer's progress bar with the last loss beside it, if it is logged, instead of a dictionary per step."""

    def __init__(self, logging_steps: int) -> None:
        super().__init__()
        self._logging_steps = logging_steps

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        due = state.global_step % self._logging_steps == 0
        if self.training_bar is not None and logs and ("eval_loss" in logs or ("loss" in logs and due)):
            shown = {key: f"{logs[key]:.4g}" for key in ("loss", "eval_loss", "eval_exact_match") if key in logs}
            self.training_bar.set_postfix(shown)

    def close(self) -> None:
        """End the bar's line, so that what is printed next has one of its own. Call it however the training ends."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None
