"""Choose the checkpoint that a run goes on from, and refuse one that the run would not continue exactly."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from hecompile.errors import InputError
from hecompile.runtime.model.adapter import CONFIG_FILE, WEIGHTS_FILE
from hecompile.runtime.training.trainer import SETTINGS_FILE

_STATE_FILE = "trainer_state.json"
_ARCHIVES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
_CHECKPOINT_FILES = (CONFIG_FILE, WEIGHTS_FILE, SETTINGS_FILE, _STATE_FILE, *_ARCHIVES)
_FIXED = {
    ("seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "train_examples"):
        "which changes the data order",
    ("model", "train_data"): "so that it would not be the same run",
    ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"):
        "which the checkpoint's optimizer would not take notice of",
    ("lr_scheduler_type", "warmup_steps", "warmup_ratio"): "which changes the steps that were taken already",
}  # fmt: skip
"""Settings that a run cannot resume with another value of, and why."""
_DIGESTS = {
    "model": "the run began with another model", "train_data": "data.train_file has other examples than it had"
}  # fmt: skip


def checkpoint_to_resume(output_dir: Path, resume: bool | str | Path) -> Path:
    """Return the directory `resume`, or, where it is True, the last checkpoint of `output_dir`. Raises InputError."""
    if resume is True:
        last = get_last_checkpoint(str(output_dir)) if output_dir.is_dir() else None
        if last is None:
            raise InputError(f"nothing to resume: {output_dir} has no checkpoint; start the run without resuming")
        return Path(last)
    checkpoint = Path(str(resume))
    if not checkpoint.is_dir():
        raise InputError(f"no checkpoint directory {checkpoint}")
    return checkpoint


def check_resumable(checkpoint: Path, output_dir: Path, settings: dict[str, object], total_steps: int) -> int:
    """Return the checkpoint's step.

    Args:
        checkpoint: the directory.
        output_dir: of the run to come.
        settings: what the checkpoints of the run to come will hold.
        total_steps: how many it is to have.

    Raises:
        InputError: the checkpoint is incomplete or damaged, of a finished run, of another model, other data or another data
            order, or its optimizer has other settings; or there are later ones in `output_dir`, which would be taken for
            those of the resumed run.
    """
    missing = [name for name in _CHECKPOINT_FILES if not (checkpoint / name).is_file()]
    if missing:
        raise InputError(f"checkpoint {checkpoint} lacks {', '.join(missing)}; resume from another one")
    try:
        step = int(json.loads((checkpoint / _STATE_FILE).read_text(encoding="utf-8"))["global_step"])
        started = dict(json.loads((checkpoint / SETTINGS_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise InputError(f"checkpoint {checkpoint} is damaged; resume from another one") from None
    for name in _ARCHIVES:
        if not _whole(checkpoint / name):
            raise InputError(f"checkpoint {checkpoint} is damaged ({name}); resume from another one")
    _refuse_changes(checkpoint, started, settings)
    last = get_last_checkpoint(str(output_dir)) if output_dir.is_dir() else None
    if last is not None and int(last.rpartition("-")[2]) > step:
        raise InputError(
            f"cannot resume step {step}: {last} is later; resume from that one, delete it, or give another output_dir"
        )
    if step >= total_steps:
        raise InputError(
            f"the run of {checkpoint} is complete (step {step} of {total_steps}), there is nothing to resume; raise "
            f"training.max_steps or training.num_train_epochs to train further"
        )
    return step


def _whole(archive: Path) -> bool:
    """Check every part of what torch saved against its check sum; nothing of it is loaded."""
    try:
        with zipfile.ZipFile(archive) as parts:
            return parts.testzip() is None
    except (OSError, zipfile.BadZipFile, EOFError, NotImplementedError):
        return False


def _refuse_changes(checkpoint: Path, started: dict[str, object], settings: dict[str, object]) -> None:
    for names, why in _FIXED.items():
        for name in names:
            if name in _DIGESTS and not (name in settings and name in started):
                continue  # a checkpoint of an earlier version has none, nor has one of private training that of its data
            if started.get(name) != settings[name]:
                change = _DIGESTS.get(name) or f"{name} was {started.get(name)} and is now {settings[name]}"
                raise InputError(f"cannot resume {checkpoint}: {change}, {why}; restore it or start a new run")
