"""The section on transports: every transport that is there is measured over a worker process. No test looks at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import report
from benchmarks.worker import transports
from benchmarks.worker.fixed_reply import FixedReplyEngine
from benchmarks.worker.linears import PLAN_ID, write_random_bundle
from hecompile.errors import WorkerError
from hecompile.runtime.transports import InProcessTransport, open_connection
from hecompile.runtime.worker.worker import Worker


def test_section_has_a_row_per_transport(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HECOMPILE_BENCHMARK_RESULTS", str(tmp_path))
    monkeypatch.setattr(transports, "LARGE_SHAPE", (64, 128))
    page = report.store_section("transports", transports, quick=True).read_text()
    rows = {
        line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in page.splitlines() if line.startswith("| ")
    }
    for kind in transports.KINDS:
        if transports.available(kind):
            assert all(float(cell.strip(" |")) > 0 for cell in rows[kind.name])
        else:
            assert kind.name in page.split("Not installed: ")[1] and kind.name not in rows
    assert {"in process", "frames, TCP", "frames, Unix socket"} <= rows.keys()


def test_a_transport_without_its_package_is_left_out() -> None:
    assert not transports.available(transports.Kind("x", "x://", "hecompile.runtime.transports.of_another_program"))


def test_fixed_replies_have_the_right_shape_and_no_client_believes_them(tmp_path: Path) -> None:
    bundle = write_random_bundle(tmp_path / "worker", {"linear": (8, 6)})
    engine = FixedReplyEngine(bundle)
    planes = np.zeros((3, 5, 8), np.uint8)
    reply = engine.evaluate("linear.forward", planes)
    assert reply.shape == (2, 5, 6) and engine.evaluate("linear.forward", planes + 1) is reply
    with pytest.raises(WorkerError, match="needs uint8"):
        engine.evaluate("linear.forward", planes.astype(np.int8))
    with pytest.raises(WorkerError, match="computes wrongly"):
        open_connection(InProcessTransport(Worker(bundle, engine).exchange), PLAN_ID)
