"""Train under the environment that launchers and clusters set: it changes no byte and opens no port."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from hecompile.environment import is_of_launcher, without_launcher
from tests.conftest import ROOT

TRAIN = """
import os, sys, threading
from pathlib import Path
import psutil
from hecompile.runtime.training import trainer
from hecompile.runtime.training.train import run_training
from tests.runtime.privacy.support import private_recipe
from tests.support.training import make_model, make_recipe, make_tokenizer

before, listening = dict(os.environ), set()
real = trainer.AdapterTrainer.training_step

def watched(self, *args, **kwargs):
    listening.update(str(one.laddr) for one in psutil.Process().net_connections() if one.status == psutil.CONN_LISTEN)
    return real(self, *args, **kwargs)

trainer.AdapterTrainer.training_step = watched
out = Path(sys.argv[1])
result = run_training(make_model(), make_tokenizer(), make_recipe(out, max_steps=2))
assert result.steps == 2 and not listening, listening
private = private_recipe(out / "private", {"noise_multiplier": 1.0}, max_steps=1)
assert run_training(make_model(), make_tokenizer(), private).steps == 1 and not listening, listening
assert all(os.environ.get(name) == value for name, value in before.items())
"""
RANK = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29601"}
ENVIRONMENTS = {
    "one process": {"WORLD_SIZE": "1", **RANK},
    "one of two": {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", **RANK},
    "MPI and Slurm": {
        "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "PMI_SIZE": "2", "PMI_RANK": "1", "SLURM_NTASKS": "2",
        "SLURM_PROCID": "1", "MV2_COMM_WORLD_SIZE": "2", "LOCAL_RANK": "none",
    },
    "accelerate": {
        "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3", "ACCELERATE_USE_FSDP": "true",
        "ACCELERATE_DYNAMO_BACKEND": "eager", "ACCELERATE_TORCH_DEVICE": "meta", "ACCELERATE_USE_DEEPSPEED": "true",
        "FSDP_VERSION": "2", "ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2",
        "KUBEFLOW_TRAINER_SERVER_URL": "http://127.0.0.1:1", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1",
    },
}  # fmt: skip


def trained(directory: Path, changes: dict[str, str]) -> bytes:
    directory.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not is_of_launcher(name)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TRAIN, str(directory)],
        cwd=ROOT, env={**kept, "PYTHONPATH": str(ROOT), **changes}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return (directory / "run/adapter/adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return trained(tmp_path_factory.mktemp("alone"), {})


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_a_launchers_environment_changes_nothing_and_opens_no_port(
    tmp_path: Path, undisturbed: bytes, name: str
) -> None:
    assert trained(tmp_path, ENVIRONMENTS[name]) == undisturbed


HARMLESS = {
    "OMP_NUM_THREADS",  # how many threads
    "PT_HPU_LAZY_MODE", "PYTORCH_ENABLE_MPS_FALLBACK", "USE_TORCH_XLA",  # of accelerators that the client does not use
    "CLEARML_PROJECT", "CLEARML_TASK", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_NESTED_RUN", "MLFLOW_RUN_ID", "MLFLOW_TAGS",
    "FOO",  # of an example in a docstring
}  # fmt: skip


def test_every_variable_that_the_libraries_read_is_hidden_or_known_to_do_nothing() -> None:
    """A variable that a new version of accelerate reads is to be looked at before it steers a run."""
    accelerate, transformers = find_spec("accelerate"), find_spec("transformers")
    assert accelerate and accelerate.origin and transformers and transformers.origin
    root = Path(accelerate.origin).parent
    skipped = {"commands", "test_utils", "launch.py", "launchers.py"}  # what sets variables for others
    sources = [path for path in root.rglob("*.py") if not skipped & set(path.parts)]
    sources += [Path(transformers.origin).parent / name for name in ("training_args.py", "trainer.py")]
    one = re.compile(r"""(?:environ(?:\.get\(|\[)|getenv\(|_from_env\()\s*"([A-Z][A-Z0-9_]+)\"""")
    several = re.compile(r"get_int_from_env\(\s*\[([^\]]+)\]")
    found = set()
    for text in (path.read_text(encoding="utf-8") for path in sources):
        found |= set(one.findall(text)) | {
            name for part in several.findall(text) for name in re.findall(r'"(\w+)"', part)
        }
    assert {"WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"} <= found
    assert {name for name in found if not is_of_launcher(name)} - HARMLESS == set()


def test_the_environment_and_the_precision_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(KeyboardInterrupt), without_launcher(), without_launcher():
            assert "WORLD_SIZE" not in os.environ and torch.get_float32_matmul_precision() == "highest"
            raise KeyboardInterrupt
        assert os.environ["WORLD_SIZE"] == "2" and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
