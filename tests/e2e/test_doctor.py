"""`hecompile doctor`: on this machine, and on a worker process in figures that agree with what training then counts."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from hecompile.bundles.kinds import CLIENT, WORKER
from hecompile.cli.main import app
from hecompile.errors import InputError, WorkerError
from hecompile.inspection.linear import circuits_without_gradient, predicted_traffic
from hecompile.runtime.client import installation
from hecompile.runtime.client.doctor import diagnose
from hecompile.runtime.transports import InProcessTransport, TransportPool, connect
from hecompile.runtime.worker.process import worker_process
from hecompile.runtime.worker.worker import Worker
from tests.e2e.conftest import Build
from tests.e2e.test_cheating import Cheat, one_row
from tests.runtime.transports.test_directory import answering, document


def test_a_worker_process_is_diagnosed(build: Build) -> None:
    with worker_process(build.directory / WORKER) as address:
        transport = TransportPool(lambda: connect(address), 1)
        diagnosis = diagnose(build.client, transport, 64)
        transport.close()
    traffic = predicted_traffic(build.client.circuits, circuits_without_gradient(build.client.graph()))
    assert diagnosis.bytes_step == pytest.approx(64 * traffic.total, rel=0.01)
    assert 0 < diagnosis.round_trip < 1 and diagnosis.worker_step > 0 and diagnosis.client_step > 0
    assert diagnosis.step >= diagnosis.worker_step + diagnosis.wire_step
    assert diagnosis.engine in ("vnni", "torch", "onnxruntime")


def test_the_command_prints_a_table_and_a_verdict(build: Build) -> None:
    with worker_process(build.directory / WORKER) as address:
        arguments = [
            sys.executable, "-W", "ignore", "-m", "hecompile.cli", "doctor", address, "--plan",
            str(build.directory / CLIENT), "--tokens", "32",
        ]  # fmt: skip
        run = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    for wanted in ("known answers", "exact", "round trip", "a step of 32 tokens", "worker", "wire"):
        assert wanted in run.stdout


def test_nobody_there_is_one_clear_error(build: Build) -> None:
    arguments = [
        sys.executable, "-W", "ignore", "-m", "hecompile.cli", "doctor", "tcp://127.0.0.1:9", "--plan",
        str(build.directory / CLIENT),
    ]  # fmt: skip
    run = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert run.returncode == 2
    assert run.stderr.strip().splitlines()[-1].startswith("error: no worker answers at tcp://127.0.0.1:9")


def test_this_machine_is_checked() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    for wanted in ("Python", "torch", "AVX2", "memory", "disk", "vnni", "chosen by auto", "ckks", "compiled kernels"):
        assert wanted in result.output


def test_a_missing_package_is_a_problem_and_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    required = installation.Requirements(">=3.11", ("numpy<1", 'no-such-package>=2; extra == "ckks"'))
    monkeypatch.setattr(installation, "read_requirements", lambda: required)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "problem: missing or of another version: numpy<1 (installed: " in result.stderr
    assert "missing no-such-package>=2; pip install -e '.[ckks]'" in result.stdout


def test_sources_that_nobody_installed_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "read_requirements", lambda: None)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "hecompile is not installed" in result.stderr and "extras" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("tcp://127.0.0.1:9",), "give --plan, the client bundle"), (("--plan", "none"), "give the worker's address too")],
)
def test_an_address_and_a_plan_belong_together(arguments: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(app, ["doctor", *arguments])
    assert isinstance(result.exception, InputError) and message in str(result.exception)


def test_a_directory_is_no_worker() -> None:
    with answering(document({"workers": ["tcp://10.0.0.7:7700"]})) as url:
        result = CliRunner().invoke(app, ["doctor", url, "--plan", "none"])
    assert isinstance(result.exception, InputError) and "give its address: tcp://10.0.0.7:7700" in str(result.exception)


def test_a_worker_that_computes_wrongly_is_named(build: Build) -> None:
    class Saturating(Cheat):
        def evaluate(self, circuit, planes):  # type: ignore[no-untyped-def]
            return one_row(self, self.honest.evaluate(circuit, planes).copy())

    transport = InProcessTransport(Worker(build.worker, Saturating(build, 0, one_row)).exchange)
    with pytest.raises(WorkerError, match="computes wrongly"):
        diagnose(build.client, transport, 8)
