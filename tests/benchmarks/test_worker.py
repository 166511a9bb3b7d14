"""The worker's section: it times nothing that replies wrongly, and asks a real worker process for its memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.worker import worker
from benchmarks.worker.linears import write_random_bundle
from hecompile.runtime.worker.engines import create_engine


def test_a_wrong_reply_is_not_timed(tmp_path: Path) -> None:
    bundle = write_random_bundle(tmp_path / "worker", {"linear": (12, 8)})
    engine = create_engine("torch", bundle)

    class OneByteOff:
        name = "off"

        def evaluate(self, circuit: str, planes: np.ndarray) -> np.ndarray:
            return engine.evaluate(circuit, planes) + np.uint8(1)

    plain = len(worker._plain())
    assert len(worker._row(bundle, {"torch": engine}, "backward", 3, rounds=1)) == 3 + (plain + 1) + plain
    with pytest.raises(RuntimeError, match=r"engine off computes linear\.forward wrongly"):
        worker._row(bundle, {"off": OneByteOff()}, "forward", 3, rounds=1)


def test_memory_is_that_of_a_worker_process_which_has_served_every_circuit(tmp_path: Path) -> None:
    bundle = write_random_bundle(tmp_path / "worker", {"linear": (2048, 2048)})
    start, forward, both = worker.worker_memory(bundle, "auto")
    assert 10 * worker.MIB < start < forward
    assert forward - start > 2048 * 2048  # the weight, at least
    assert both < 2000 * worker.MIB
