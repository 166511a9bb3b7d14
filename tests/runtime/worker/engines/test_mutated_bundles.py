"""Whatever a bundle's manifest and files say, it is refused at open or served exactly: nothing outside them is read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from hecompile.bundles.kinds import MANIFEST
from hecompile.bundles.worker import WorkerBundle
from hecompile.errors import InputError
from hecompile.runtime.worker.engines import vnni_kernel
from tests.runtime.worker.engines.mutated_bundles import seal
from tests.support.bundles import extreme_weight, write_bundle

COUNTS = {"vnni": 300, "torch": 300, "onnxruntime": 300, "concrete": 60}


@pytest.mark.parametrize("engine", COUNTS)
def test_a_mutated_bundle_is_refused_or_served_exactly(engine: str) -> None:
    """In a process of its own: an engine that reads what is not its own may end the interpreter."""
    if engine == "vnni" and not vnni_kernel.supported():
        pytest.skip("this CPU has no AVX512-VNNI")
    command = [sys.executable, "-m", "tests.runtime.worker.engines.mutated_bundles", engine, str(COUNTS[engine])]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    last = (ended.stdout.splitlines() or ["nothing"])[-1]
    assert ended.returncode == 0, f"status {ended.returncode} after {last}: {ended.stderr[-2000:]}"
    counts = json.loads(last)
    assert counts["refused"] + counts["served"] == COUNTS[engine]
    assert counts["refused"] > COUNTS[engine] // 2 and counts["served"] > COUNTS[engine] // 20


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"in_features": 16}, r"model\.onnx is damaged: its weight is \[768, 256\], the manifest says \[16, 256\]"),
        ({"in_features": 4096}, r"the manifest says \[4096, 256\]"),
        ({"upload_bits": 32}, "is not one of a circuit with the manifest's dimensions"),
        ({"reply_bits": 8}, "is not one of a circuit with the manifest's dimensions"),
        ({"reply_bits": 32}, "replies with 32 bits of 24"),
        ({"in_features": 65794}, "in_features: "),
    ],
)
def test_dimensions_that_are_not_the_files_are_named(tmp_path: Path, changed: dict[str, int], message: str) -> None:
    write_bundle(tmp_path / "worker", {"linear": (extreme_weight(768, 256), 24, 16)})
    manifest = json.loads((tmp_path / "worker" / MANIFEST).read_text())
    manifest["circuits"][0].update(changed)
    seal(tmp_path / "worker", manifest)
    with pytest.raises(InputError, match=message):
        WorkerBundle.open(tmp_path / "worker")


@pytest.mark.parametrize(("key", "value"), [("offset", "-1"), ("offset", "76801"), ("length", "1"), ("offset", "9" * 40)])
def test_a_place_beyond_the_weight_file_is_refused(tmp_path: Path, key: str, value: str) -> None:
    bundle = write_bundle(tmp_path / "worker", {"linear": (extreme_weight(300, 256), 24, 16)})
    path = bundle.circuit_path("linear.forward")
    model = onnx.load(path, load_external_data=False)
    (entry,) = (entry for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == key)
    entry.value = value
    path.write_bytes(model.SerializeToString())
    seal(tmp_path / "worker", json.loads((tmp_path / "worker" / MANIFEST).read_text()))
    with pytest.raises(InputError, match=r"model\.onnx is damaged: (the place of its weight|its weight ends at byte)"):
        WorkerBundle.open(tmp_path / "worker")


def test_a_weight_file_that_is_a_link_out_of_the_bundle_is_refused(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "worker", {"linear": (extreme_weight(300, 256), 24, 16)})
    weight = bundle.circuit_path("linear.forward").with_name("weight.bin")
    weight.rename(tmp_path / "elsewhere.bin")
    weight.symlink_to(tmp_path / "elsewhere.bin")
    with pytest.raises(InputError, match="a link that leads outside the bundle"):
        WorkerBundle.open(tmp_path / "worker")
