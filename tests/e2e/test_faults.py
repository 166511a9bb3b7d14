"""kill -9 of worker, client and both in the middle of training, and workers that cheat: the run goes on as if nothing was.

Over the cleartext engine the resumed run's adapter is that of an uninterrupted one, bit for bit: data order, optimizer,
schedule and dropout are where they were. Encrypted runs draw fresh secrets, and differ by their noise.
"""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hecompile.bundles.kinds import CLIENT, WORKER
from hecompile.demonstrations.small import RECIPE
from hecompile.errors import VerificationError
from hecompile.runtime.client.encrypted_model import EncryptedCausalLM
from hecompile.runtime.client.products import EncryptedProducts
from hecompile.runtime.transports import InProcessTransport, Replicas
from hecompile.runtime.wire.framing import PREFIX
from hecompile.runtime.worker.process import running_worker
from hecompile.runtime.worker.worker import Worker
from tests.e2e.conftest import BATCH_SIZE, Build
from tests.e2e.test_cheating import Cheat, one_row

STEPS = 8
RANDOM = random.Random(20261123)


def command(build: Build, output: Path, *more: str) -> list[str]:
    overrides = [
        f"model={build.directory / CLIENT}", f"training.output_dir={output}", f"training.max_steps={STEPS}",
        "training.warmup_steps=2", "training.save_steps=1", f"training.per_device_train_batch_size={BATCH_SIZE}",
        "data.validation_file=null", "training.disable_tqdm=true", *more,
    ]  # fmt: skip
    return [sys.executable, "-W", "ignore", "-m", "hecompile.cli", "train", str(RECIPE), *overrides]


def cleartext(build: Build) -> list[str]:
    return ["worker=inprocess", "engine=cleartext", f"worker_bundle={build.directory / WORKER}"]


def finish(arguments: list[str]) -> None:
    run = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


def kill_within(arguments: list[str], output: Path, step: int) -> None:
    """Start, and SIGKILL at a random moment after that step has been written."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_step(output, step, process)
        time.sleep(RANDOM.uniform(0.0, 0.15))
    finally:
        process.kill()
        process.wait()
    assert not (output / "adapter").exists()


def wait_for_step(output: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 240
    metrics = output / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count('"loss"') >= step):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def adapter(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


def test_a_client_that_is_killed_twice_ends_with_the_same_bits(build: Build, tmp_path: Path) -> None:
    finish(command(build, tmp_path / "straight", *cleartext(build)))
    arguments = command(build, tmp_path / "killed", *cleartext(build))
    kill_within(arguments, tmp_path / "killed", 2)
    kill_within([*arguments, "--resume"], tmp_path / "killed", 5)
    finish([*arguments, "--resume"])
    one, other = adapter(tmp_path / "straight"), adapter(tmp_path / "killed")
    assert one.keys() == other.keys() and len(one) == 56
    assert all(torch.equal(one[name], other[name]) for name in one)


def interrupt(arguments: list[str], wait: Callable[[subprocess.Popen[bytes]], object]) -> bytes:
    """Start, send SIGINT once `wait` returns, and return the last line of standard error."""
    # Where this process ignores SIGINT, as in the background of a shell script, its children would too.
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        wait(process)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    return said.splitlines()[-1]


def test_an_interrupt_says_how_to_go_on(build: Build, tmp_path: Path) -> None:
    output = tmp_path / "run"
    arguments = command(build, output, *cleartext(build))
    said = interrupt([*arguments, "training.max_steps=100000"], lambda process: wait_for_step(output, 2, process))
    assert re.fullmatch(rb"interrupted; the same command with --resume goes on from checkpoint-\d+", said)


@contextmanager
def worker_on(build: Build, port: int) -> Iterator[subprocess.Popen[str]]:
    with running_worker(build.directory / WORKER, ("--listen", f"tcp://127.0.0.1:{port}")) as (process, _):
        yield process


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_a_worker_that_is_killed_and_replaced_and_then_the_client(build: Build, tmp_path: Path) -> None:
    port, output = free_port(), tmp_path / "run"
    arguments = command(build, output, f"worker=tcp://127.0.0.1:{port}", "connection.attempts=12")
    with worker_on(build, port) as worker:
        client = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for_step(output, 2, client)
            os.kill(worker.pid, signal.SIGKILL)
            worker.wait()
            with worker_on(build, port):  # the same client goes on in the same step
                wait_for_step(output, 5, client)
                client.kill()
        finally:
            client.kill()
            client.wait()
    with worker_on(build, port):
        finish([*arguments, "--resume"])
    steps = [line for line in (output / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert len(steps) == STEPS
    assert all(bool(torch.isfinite(value).all()) for value in adapter(output).values())


def test_a_worker_that_stays_away_ends_the_run_with_where_to_go_on_from(build: Build, tmp_path: Path) -> None:
    port, output = free_port(), tmp_path / "run"
    shown = "training.disable_tqdm=false"
    arguments = [*command(build, output, f"worker=tcp://127.0.0.1:{port}", "connection.attempts=1"), shown]
    with worker_on(build, port) as worker:
        client = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            wait_for_step(output, 2, client)
            worker.kill()
            _, said = client.communicate(timeout=60)
        finally:
            client.kill()
            client.wait()
    assert client.returncode == 2
    last = said.splitlines()[-1]  # of its own: the progress bar's line has ended
    assert re.fullmatch(r"error: .*\. The steps up to there are kept: .* with --resume goes on from checkpoint-\d+", last)


@pytest.mark.parametrize("out", [True, False])
def test_an_interrupt_of_answering_is_answered(build: Build, tmp_path: Path, out: bool) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Question: Who?\n" * 200)
    kept = tmp_path / "answers.jsonl"
    arguments = [
        sys.executable, "-W", "ignore", "-m", "hecompile.cli", "infer", str(build.directory / CLIENT), "--worker-bundle",
        str(build.directory / WORKER), "--engine", "cleartext", "--prompts-file", str(prompts), "--max-new-tokens", "2",
        *(["--out", str(kept)] if out else []),
    ]  # fmt: skip

    def wait(process: subprocess.Popen[bytes]) -> None:
        partial = kept.with_name(kept.name + ".partial")
        while out and not (partial.exists() and len(partial.read_text().splitlines()) > 2):
            assert process.poll() is None
            time.sleep(0.01)
        assert out or (process.stdout is not None and process.stdout.readline())

    more = b"; the answers that are there are kept: the same command goes on from them" if out else b""
    assert interrupt(arguments, wait) == b"interrupted" + more


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the distance of two adapters, relative to the first."""
    difference = sum(float((one[name] - other[name]).square().sum()) for name in one)
    return float((difference / sum(float(value.square().sum()) for value in one.values())) ** 0.5)


def test_a_resumed_encrypted_run_agrees_as_closely_as_two_uninterrupted_ones(build: Build, tmp_path: Path) -> None:
    inprocess = ["worker=inprocess", f"worker_bundle={build.directory / WORKER}"]
    for name in ("one", "other"):
        finish(command(build, tmp_path / name, *inprocess))
    arguments = command(build, tmp_path / "killed", *inprocess)
    kill_within(arguments, tmp_path / "killed", 3)
    finish([*arguments, "--resume"])
    one, other, killed = (adapter(tmp_path / name) for name in ("one", "other", "killed"))
    between = distance(one, other)
    assert 0 < between < 0.05
    print(f"two runs: {between:.5f}; the killed one: {distance(one, killed):.5f}, {distance(other, killed):.5f}")
    assert max(distance(one, killed), distance(other, killed)) < 2 * between


def payload(frame: bytes) -> bytes:
    size: int = PREFIX.unpack(frame[: PREFIX.size])[2]
    return frame[len(frame) - size :]


def test_a_cheating_worker_is_left_for_an_honest_one_with_the_same_ciphertext(own_build: Build) -> None:
    build = own_build
    cheat = Cheat(build, 2, one_row)
    sent: dict[str, list[bytes]] = {"bad": [], "good": []}

    def transport(name: str, worker: Worker) -> InProcessTransport:
        return InProcessTransport(worker.exchange, lambda way, frame: sent[name].append(frame) if way == "sent" else None)

    workers = {
        "bad": lambda: transport("bad", Worker(build.worker, cheat)),
        "good": lambda: transport("good", Worker(build.worker)),
    }
    products = EncryptedProducts(build.client, Replicas(workers), retry_elsewhere=True)
    circuit, parameters = next(iter(build.client.circuits.items()))
    weight = torch.from_numpy(build.worker.weight(circuit).copy()).float()
    for seed in range(4):
        x = torch.randn(40, parameters.in_features, generator=torch.Generator().manual_seed(seed))
        result = products.product(circuit, x)
        assert float((result - x @ weight).norm() / (x @ weight).norm()) < 0.01
    assert len(cheat.lied) == 1
    assert payload(sent["bad"][-1]) in [payload(frame) for frame in sent["good"]]
    assert len(payload(sent["bad"][-1])) == parameters.bytes_up(40)
    products.close()


def test_the_only_worker_cheats_and_nobody_else_is_left(own_build: Build) -> None:
    build = own_build
    workers = {"bad": lambda: InProcessTransport(Worker(build.worker, Cheat(build, 0, one_row)).exchange)}
    products = EncryptedProducts(build.client, Replicas(workers), retry_elsewhere=True)
    circuit, parameters = next(iter(build.client.circuits.items()))
    with pytest.raises(VerificationError, match=rf"{circuit}: bad: .*No other worker is left to trust"):
        products.product(circuit, torch.randn(40, parameters.in_features))


def test_threads_that_share_the_workers_agree_on_whom_to_distrust(own_build: Build) -> None:
    build = own_build
    workers = {
        "bad": lambda: InProcessTransport(Worker(build.worker, Cheat(build, 0, one_row)).exchange),
        "good": lambda: InProcessTransport(Worker(build.worker).exchange),
    }
    products = EncryptedProducts(build.client, Replicas(workers), retry_elsewhere=True)
    model = EncryptedCausalLM(build.client, products)
    circuit, parameters = next(iter(build.client.circuits.items()))
    results: list[bool] = []

    def ask(seed: int) -> None:
        x = torch.randn(20, parameters.in_features, generator=torch.Generator().manual_seed(seed))
        results.append(bool(torch.isfinite(model.products.product(circuit, x)).all()))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4
