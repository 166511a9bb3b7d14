"""Resume from good checkpoints, refuse others, and meet a disk that fills up."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hecompile.errors import InputError
from hecompile.runtime.training.train import run_training
from tests.conftest import ROOT
from tests.runtime.training.test_train import assert_same_adapter
from tests.support.training import RECORDS, SECRET, make_model, make_recipe, make_tokenizer, write_jsonl

TOKENIZER = make_tokenizer()


def test_what_cannot_be_resumed_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing to resume: .*run has no checkpoint"):
        run_training(make_model(), TOKENIZER, make_recipe(tmp_path), resume=True)
    assert not (tmp_path / "run").exists()
    run_training(make_model(), TOKENIZER, make_recipe(tmp_path))
    metrics = (tmp_path / "run/metrics.jsonl").read_bytes()
    first = tmp_path / "run/checkpoint-3"
    with pytest.raises(InputError, match=r"no checkpoint directory .*checkpoint-4"):
        run_training(make_model(), TOKENIZER, make_recipe(tmp_path), resume=tmp_path / "run/checkpoint-4")
    with pytest.raises(InputError, match=r"is complete \(step 6 of 6\)"):
        run_training(make_model(), TOKENIZER, make_recipe(tmp_path), resume=True)
    with pytest.raises(InputError, match="data_seed was 42 and is now 7"):
        run_training(make_model(), TOKENIZER, make_recipe(tmp_path, data_seed=7), resume=first)
    with pytest.raises(InputError, match=r"cannot resume step 3: .*checkpoint-6 is later"):
        run_training(make_model(), TOKENIZER, make_recipe(tmp_path), resume=first)
    stored = first / "training_settings.json"
    kept = stored.read_text()
    stored.write_text("{}")
    with pytest.raises(InputError, match="seed was None and is now 42"):
        run_training(make_model(), TOKENIZER, make_recipe(tmp_path), resume=first)
    stored.write_text(kept)
    (first / "optimizer.pt").unlink()
    with pytest.raises(InputError, match=r"checkpoint-3 lacks optimizer\.pt"):
        run_training(make_model(), TOKENIZER, make_recipe(tmp_path), resume=first)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        path = tmp_path / "run/checkpoint-6" / name
        whole = path.read_bytes()
        for damaged in (whole[:-100], whole[: len(whole) // 2], b""):
            path.write_bytes(damaged)
            with pytest.raises(InputError, match=rf"checkpoint-6 is damaged \({name}\); resume from another one"):
                run_training(make_model(), TOKENIZER, make_recipe(tmp_path, max_steps=7), resume=True)
        path.write_bytes(whole)
    for state in ("{", "[" * 100_000, '{"global_step": 1e999}'):
        (tmp_path / "run/checkpoint-6/trainer_state.json").write_text(state)
        with pytest.raises(InputError, match="checkpoint-6 is damaged"):
            run_training(make_model(), TOKENIZER, make_recipe(tmp_path), resume=True)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == metrics


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"learning_rate": 1e-4}, r"learning_rate was 0\.005 and is now 0\.0001, which the checkpoint's optimizer"),
        ({"weight_decay": 0.1}, r"weight_decay was 0\.0 and is now 0\.1"),
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type was linear and is now cosine, which changes the steps"),
        ({"warmup_steps": 1}, "warmup_steps was 2"),
    ],
)
def test_settings_that_a_resumed_run_would_not_heed_are_refused(
    tmp_path: Path, training: dict[str, Any], message: str
) -> None:
    run_training(make_model(), TOKENIZER, make_recipe(tmp_path))
    with pytest.raises(InputError, match=message):
        run_training(make_model(), TOKENIZER, make_recipe(tmp_path, max_steps=9, **training), resume=True)
    assert run_training(make_model(), TOKENIZER, make_recipe(tmp_path, max_steps=9), resume=True).steps == 9


def test_a_run_does_not_go_on_with_another_model_or_other_data(tmp_path: Path) -> None:
    run_training(make_model(), TOKENIZER, make_recipe(tmp_path))
    metrics = (tmp_path / "run/metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="checkpoint-6: the run began with another model"):
        run_training(make_model(seed=5), TOKENIZER, make_recipe(tmp_path, max_steps=7), resume=True)
    recipe = make_recipe(tmp_path, max_steps=7)
    changed = [RECORDS[0] | {"completion": " other"}, *RECORDS[1:]]
    write_jsonl(recipe.data.train_file, changed)
    with pytest.raises(InputError, match=r"data\.train_file has other examples than it had"):
        run_training(make_model(), TOKENIZER, recipe, resume=True)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == metrics
    settings = tmp_path / "run/checkpoint-6/training_settings.json"
    kept = json.loads(settings.read_text())
    assert SECRET not in settings.read_text()
    settings.write_text(json.dumps({key: value for key, value in kept.items() if key not in ("model", "train_data")}))
    assert run_training(make_model(), TOKENIZER, recipe, resume=True).steps == 7  # as a version without them wrote it


FULL = """
import resource, signal, sys
from pathlib import Path
from hecompile.errors import InputError
from hecompile.runtime.training.train import run_training
from tests.support.training import make_model, make_recipe, make_tokenizer

directory = Path(sys.argv[1])
model = make_model()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

def fill(module, args, kwargs):
    if len(list((directory / "run").glob("checkpoint-*"))) == int(sys.argv[2]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

model.register_forward_pre_hook(fill, with_kwargs=True)
try:
    run_training(model, make_tokenizer(), make_recipe(directory, save_steps=1))
except InputError as error:
    print(error)
"""


def test_a_disk_that_is_full_leaves_the_earlier_checkpoint_to_resume_from(tmp_path: Path) -> None:
    """The kernel refuses to write on, as on a full disk: a limit on the size of files, set after step 3, in a process
    of its own."""
    recipe = make_recipe(tmp_path, save_steps=1)
    straight = make_model()
    run_training(straight, TOKENIZER, recipe)
    shutil.rmtree(tmp_path / "run")
    arguments = [sys.executable, "-W", "ignore", "-c", FULL, str(tmp_path), "3"]
    run = subprocess.run(arguments, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert re.search(r"checkpoint of step 4 cannot be written to .*--resume", run.stdout), run.stdout + run.stderr
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"checkpoint-1", "checkpoint-2", "checkpoint-3"} <= names and "checkpoint-4" not in names
    resumed = make_model()
    assert run_training(resumed, TOKENIZER, recipe, resume=True).steps == 6
    assert_same_adapter(straight, resumed)


def test_a_disk_that_is_full_at_once_leaves_nothing_to_resume_from(tmp_path: Path) -> None:
    arguments = [sys.executable, "-W", "ignore", "-c", FULL, str(tmp_path), "0"]
    run = subprocess.run(arguments, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert re.search(r"checkpoint of step 1 cannot .*There is no earlier one: make room and start again", run.stdout), run
