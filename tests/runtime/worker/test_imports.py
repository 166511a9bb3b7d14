"""A worker process has no code of the encryption scheme in it, and nothing that only a client or compiler needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hecompile.runtime.worker.engines.vnni_kernel import supported
from tests.support.bundles import extreme_weight, write_bundle

SERVES = """
import sys
import hecompile.cli.main, hecompile.cli.worker  # the command `hecompile worker serve`
import hecompile.runtime.worker.servers.open_server
from hecompile.bundles.worker import WorkerBundle, known_answer_vector
from hecompile.runtime.worker.engines import create_engine
from hecompile.runtime.worker.worker import Worker

bundle = WorkerBundle.open(sys.argv[1])
worker = Worker(bundle, create_engine(sys.argv[2], bundle))
planes, expected = known_answer_vector(bundle.plan_id)
assert (worker.engine.evaluate("known_answer", planes) == expected).all()
print(*sorted(sys.modules))
"""


def modules_of(bundle: Path, engine: str) -> set[str]:
    command = [sys.executable, "-c", SERVES, str(bundle), engine]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return set(ran.stdout.split())


@pytest.mark.parametrize("engine", ["vnni", "onnxruntime"])
def test_a_worker_loads_no_code_of_the_scheme_and_no_torch(engine: str, tmp_path: Path) -> None:
    """Torch alone is 240 MB that a worker would hold beside the weights."""
    if engine == "vnni" and not supported():
        pytest.skip("this CPU has no AVX512-VNNI")
    bundle = write_bundle(tmp_path / "worker", {"layers.0.wide": (extreme_weight(512, 256), 24, 16)})
    loaded = modules_of(bundle.directory, engine)
    assert "hecompile.runtime.worker.worker" in loaded and "onnx" in loaded
    rooms = {f"hecompile.{room}" for room in ("he", "graph", "plan", "compiler", "passes")}
    assert not (rooms | {"torch", "transformers", "onnx_ir"}) & loaded
