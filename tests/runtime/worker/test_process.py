"""A worker in a process of its own: where it listens is told by an event, and why it did not start by its last words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hecompile.errors import WorkerError
from hecompile.runtime.transports import connect, open_connection
from hecompile.runtime.worker.process import running_worker, serve_command, wait_until_listening, worker_process
from tests.support.bundles import PLAN_ID, extreme_weight, write_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("process") / "bundle", {"linear": (extreme_weight(8, 6), 24, 16)}).directory


def test_a_worker_is_started_and_stopped(bundle: Path) -> None:
    with running_worker(bundle, ("--engine", "onnxruntime")) as (process, address):
        transport = connect(address)
        open_connection(transport, PLAN_ID)
        transport.close()
    assert process.returncode == 0


def test_one_that_does_not_start_is_named_with_its_reason(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"did not start: .*is not a worker bundle"), worker_process(tmp_path):
        pass
    with pytest.raises(WorkerError, match=r"did not start: .*unknown engine"), worker_process(bundle, engine="abacus"):
        pass


def test_other_lines_before_the_event_are_passed_over() -> None:
    program = "print('a library says hello'); print('{\"event\": \"listening\", \"address\": \"tcp://127.0.0.1:1\"}')"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert wait_until_listening(process) == "tcp://127.0.0.1:1"


def test_a_person_reads_a_sentence(bundle: Path) -> None:
    command = [part for part in serve_command(bundle) if part not in ("--events", "json")]
    with subprocess.Popen(
        [*command, "--listen", "tcp://127.0.0.1:0", "--engine", "onnxruntime"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("listening on tcp://127.0.0.1:")
        process.terminate()
