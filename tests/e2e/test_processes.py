"""Train through a worker in a process of its own, over a real socket, and compare with plaintext PEFT in that order."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hecompile.bundles.kinds import CLIENT, WORKER
from hecompile.compiler.worker_bundle_writer import WorkerBundleWriter
from hecompile.demonstrations.small import RECIPE
from hecompile.errors import WorkerError
from hecompile.runtime.client.session import open_session
from hecompile.runtime.recipes.training import Recipe, load_recipe
from hecompile.runtime.training.comparison import compare_losses, step_split
from hecompile.runtime.training.metrics import METRICS_FILE
from hecompile.runtime.training.train import run_training
from hecompile.runtime.worker.process import worker_process
from tests.e2e.conftest import BATCH_SIZE, Build

STEPS = 6


def recipe_for(build: Build, output_dir: Path, worker: str) -> Recipe:
    overrides = [f"model={build.directory / CLIENT}", f"worker={worker}", f"training.output_dir={output_dir}"]
    overrides += [f"training.max_steps={STEPS}", "training.warmup_steps=1", "training.save_steps=3"]
    overrides += [f"training.per_device_train_batch_size={BATCH_SIZE}", "data.validation_file=null"]
    return load_recipe(RECIPE, [*overrides, "training.disable_tqdm=true"])


def test_training_over_a_socket_follows_plaintext_and_resumes(build: Build, tmp_path: Path) -> None:
    with worker_process(build.directory / WORKER) as address:
        recipe = recipe_for(build, tmp_path / "encrypted", address)
        with open_session(recipe) as session:
            initial = {name: value.detach().clone() for name, value in session.model.adapter_state().items()}
            result = run_training(session.model, session.tokenizer, recipe)
        assert result.steps == STEPS and (result.adapter_dir / "adapter_model.safetensors").is_file()
        shutil.rmtree(tmp_path / "encrypted" / f"checkpoint-{STEPS}")
        with open_session(recipe) as session:  # and again from the middle, by a client that knows nothing of the first
            resumed = run_training(session.model, session.tokenizer, recipe, resume=tmp_path / "encrypted/checkpoint-3")
        assert resumed.steps == STEPS
        tokenizer = session.tokenizer
    plain = build.plaintext()
    plain.load_adapter_state(initial)
    run_training(plain, tokenizer, recipe_for(build, tmp_path / "plain", address))
    comparison = compare_losses(tmp_path / "encrypted" / METRICS_FILE, tmp_path / "plain" / METRICS_FILE)
    assert comparison.steps == STEPS
    assert comparison.follows, comparison
    split = step_split(tmp_path / "encrypted" / METRICS_FILE)
    assert split.worker > 0 and split.client_crypto > 0 and split.bytes_up_per_token > 0


def test_a_client_that_never_compiled_loads_its_plan(build: Build) -> None:
    """In a process of its own: nothing that only the compiler imports may be missing."""
    program = (
        "import sys; from hecompile.bundles.client import ClientBundle; "
        "from hecompile.runtime.client.encrypted_model import EncryptedCausalLM; "
        "from hecompile.runtime.client.products import CleartextProducts; "
        "from hecompile.bundles.worker import WorkerBundle; "
        "bundle, worker = ClientBundle.open(sys.argv[1]), WorkerBundle.open(sys.argv[2]); "
        "print(len(EncryptedCausalLM(bundle, CleartextProducts(bundle, worker)).adapter_state()))"
    )
    arguments = [sys.executable, "-W", "ignore", "-c", program, *(build.directory / name for name in (CLIENT, WORKER))]
    run = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert (run.returncode, run.stdout.strip()) == (0, str(2 * 7 * 4)), run.stderr


def test_a_worker_of_another_plan_is_refused(build: Build, tmp_path: Path) -> None:
    with WorkerBundleWriter(tmp_path / "other", "ab" * 32) as writer:
        writer.commit()
    with worker_process(tmp_path / "other") as address:
        recipe = recipe_for(build, tmp_path / "run", address)
        with pytest.raises(WorkerError, match="another plan"), open_session(recipe):
            pass
    assert not (tmp_path / "run").exists()
