"""The GPU's section where there is no GPU: it checks the engine, times nothing and says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.worker import gpu
from benchmarks.worker.linears import random_planes, write_random_bundle
from hecompile.runtime.worker.engines.cuda_engine import CudaEngine
from hecompile.runtime.worker.engines.torch_engine import readable


@pytest.fixture
def engine(tmp_path: Path) -> CudaEngine:
    return CudaEngine(write_random_bundle(tmp_path / "worker", {"linear": (24, 40)}), "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the section measures")
def test_without_a_gpu_the_section_says_what_was_not_run() -> None:
    text = gpu.run(quick=True)
    assert "Not run" in text and f"{2 * len(gpu.SMALL_LAYER)} circuits" in text and "ms" not in text.split()


@pytest.mark.parametrize("circuit", ["linear.forward", "linear.backward"])
def test_the_product_that_is_timed_is_the_one_that_is_served(engine: CudaEngine, circuit: str) -> None:
    planes = random_planes(7, engine._bundle.circuits[circuit].in_features)
    timed = gpu.device_product(engine, circuit, readable(planes))().cpu().numpy()
    assert np.array_equal(timed, engine.evaluate(circuit, planes))


def test_a_wrong_reply_is_not_timed(engine: CudaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    right = engine.evaluate
    gpu.check_extremes(engine, engine._bundle, "linear.forward")
    monkeypatch.setattr(engine, "evaluate", lambda circuit, planes: right(circuit, planes) ^ np.uint8(1))
    with pytest.raises(RuntimeError, match=r"torch-cuda computes linear\.forward wrongly"):
        gpu.check_extremes(engine, engine._bundle, "linear.forward")
