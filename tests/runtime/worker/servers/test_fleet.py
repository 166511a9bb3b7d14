"""Two shards of two replicas each on Ray Serve, on this machine; one is killed in the middle of training."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from hecompile.bundles.kinds import CLIENT, WORKER
from hecompile.compiler.linear import CompileOptions, compile_checkpoint
from hecompile.errors import InputError
from hecompile.models import TINY_LLAMA
from hecompile.runtime.client.session import open_session
from hecompile.runtime.recipes.training import load_recipe
from hecompile.runtime.training.metrics import read_metrics
from hecompile.runtime.training.train import run_training
from hecompile.runtime.worker.servers.fleet import FleetFile, deploy, load_fleet, stop

RECIPE = Path("models/recipes/demo.yaml")


def test_bad_fleet_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    for text, message in (
        ("bundle: x\nshards: 0\n", "shards: Input should be greater"),
        ("bundle: x\nsurprise: 1\n", "unknown key surprise"),
        ("shards: 2\n", "the key bundle is missing"),
        ("[]", "must be a YAML mapping"),
        ("bundle: x\nshards: 2\nshards: 3\n", "repeated or non-text key 'shards' .* line 3"),
        ("bundle: " + "[" * 10_000, "nested too deeply"),
        ("bundle: x\nreplicas: 2\nlisten: tcp://127.0.0.1:5000\n", "cannot be the address of several workers"),
        ("bundle: x\nlisten: http://x\n", "needs tcp://"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            load_fleet(path)
    path.write_text("bundle: build/worker\nshards: 2\n")
    assert load_fleet(path) == FleetFile(bundle=tmp_path / "build" / "worker", shards=2)
    with pytest.raises(InputError, match=r"missing\.yaml does not exist"):
        load_fleet(tmp_path / "missing.yaml")


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fleet") / "build"
    compile_checkpoint(str(TINY_LLAMA), directory, CompileOptions(batch_size=4, sequence_buckets=(32, 48)))
    return directory


@pytest.fixture(scope="module")
def directory(build: Path) -> Iterator[str]:
    pytest.importorskip("ray")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    listen = "grpc://127.0.0.1:0"  # Open Inference Protocol
    yield deploy(
        FleetFile(bundle=build / WORKER, shards=2, replicas=2, cpus_per_replica=0.2, http_port=port, listen=listen)
    )
    stop()


def listed(url: str) -> list[str]:
    with urllib.request.urlopen(url, timeout=10) as answer:
        workers: list[str] = json.load(answer)["workers"]
    return workers


def pid_listening_on(address: str) -> int:
    """Who has the listening socket of that port."""
    port = int(address.rsplit(":", 1)[1])
    listening = [link for link in psutil.net_connections("tcp") if link.status == psutil.CONN_LISTEN]
    (pid,) = {link.pid for link in listening if link.laddr.port == port and link.pid is not None}
    return pid


def test_training_goes_on_while_a_replica_is_killed_and_replaced(build: Path, directory: str, tmp_path: Path) -> None:
    before = listed(directory)
    assert len(before) == 4
    overrides = [
        f"model={build / CLIENT}", f"worker={directory}", f"training.output_dir={tmp_path / 'run'}", "training.max_steps=8",
        "training.warmup_steps=2", "training.per_device_train_batch_size=4", "data.validation_file=null",
        "training.save_strategy=no", "training.disable_tqdm=true", "connection.attempts=20",
    ]  # fmt: skip
    recipe = load_recipe(RECIPE, overrides)
    metrics = tmp_path / "run" / "metrics.jsonl"
    killed: list[int] = []

    def kill() -> None:
        while not (metrics.exists() and metrics.read_text().count('"loss"') >= 2):
            time.sleep(0.02)
        killed.append(pid_listening_on(before[0]))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    with open_session(recipe) as session:
        killer.start()
        result = run_training(session.model, session.tokenizer, recipe)
        killer.join()
    assert result.steps == 8 and killed
    losses = [record["loss"] for record in read_metrics(metrics) if "loss" in record]
    assert len(losses) == 8 and all(torch.isfinite(torch.tensor(losses)))
    deadline = time.monotonic() + 90
    while len(after := listed(directory)) < 4 or before[0] in after:
        assert time.monotonic() < deadline, after
        time.sleep(0.5)
