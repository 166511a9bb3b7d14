"""Measure the export of a checkpoint of the shape of Llama-3.2-1B: seconds by phase, peak memory, bytes on disk.

    python -m benchmarks compile_1b [--quick]

Runs the command line in a process of its own. The checkpoint is that of $HECOMPILE_BENCHMARK_1B where it is set, or is made;
the build goes to a temporary folder under build/ (8 GB) and is removed. Quick: 2 layers. With $HECOMPILE_BENCHMARK_8B_LAYERS
so many layers of the shape of Llama-3.1-8B follow, without stored hints, and what all 32 would take is extrapolated from a
run of one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import ROOT, table
from benchmarks.training.builds import ONE_B, scratch_folder
from benchmarks.training.checkpoints import make_checkpoint
from hecompile.bundles.client import ClientBundle
from hecompile.bundles.kinds import CLIENT, WORKER
from hecompile.compiler.frontend import load_config
from hecompile.compiler.phases import parse_summary
from hecompile.inspection.prediction import ModelSize

OPTIONS = ("--weight-bits", "8", "--batch-size", "1", "--sequence-buckets", "512")
PASSES = "passes, parameter selection, validation"
LAYERS_8B = "HECOMPILE_BENCHMARK_8B_LAYERS"
_GROUPS = {"load": "load", "export": "export", "sample": "sample", "calibrate": "calibrate", "write": "write"}
_MEANING = {
    "load": "load the checkpoint in float32",
    "export": "torch to ONNX",
    "sample": "calibration text, written by the model (8 x 32 tokens)",
    "calibrate": "calibration, forward and backward",
    PASSES: PASSES,
    "hints": "hints and worker circuits, made, written and hashed",
    "write": "client plan and manifest",
}


@dataclass(frozen=True)
class Export:
    """Hold what a run of `hecompile export llama` took: wall seconds, peak resident bytes, seconds by phase."""

    seconds: float
    peak_bytes: int
    phases: dict[str, float]


def export(checkpoint: Path, out: Path, *further: str) -> Export:
    """Run the command line on `checkpoint`. Raises RuntimeError with its last words when it fails."""
    command = [sys.executable, "-m", "hecompile.cli", "export", "llama", "--model", str(checkpoint), "--out", str(out)]
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen([*command, *OPTIONS, *further], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    summary = re.search(r"^seconds: .*$", text, re.MULTILINE)
    if process.returncode or summary is None:
        raise RuntimeError(f"{' '.join(command)} failed with {process.returncode}: {text[-500:]}")
    return Export(seconds, usage.ru_maxrss * 1024, parse_summary(summary.group()))


def grouped(export: Export) -> dict[str, float]:
    """Sum seconds by group of phases, in the order of `_MEANING`; time in no phase is start-up and imports."""
    groups = dict.fromkeys(_MEANING, 0.0)
    for phase, seconds in export.phases.items():
        groups["hints" if phase.startswith(("hints", "resume")) else _GROUPS.get(phase, PASSES)] += seconds
    return {_MEANING[group]: seconds for group, seconds in groups.items()} | {
        "start-up": max(0.0, export.seconds - sum(groups.values()))
    }


def folder_bytes(folder: Path) -> int:
    """Sum the sizes of all files under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def run(quick: bool) -> str:
    """Return Markdown: seconds by phase, and sizes beside their predictions."""
    layers = 2 if quick else 16
    given = os.environ.get(ONE_B)
    with scratch_folder() as folder:
        here = Path(given) / "checkpoint" if given and not quick else make_checkpoint(folder / "checkpoint", layers)
        text = _markdown(export(here, folder / "out"), here, folder / "out", layers)
    return "\n\n".join([text, *([_shape_8b(int(os.environ[LAYERS_8B]))] if LAYERS_8B in os.environ else [])])


def _shape_8b(layers: int) -> str:
    """Return Markdown on one layer and on `layers` of the 8B shape; raises ValueError for fewer than two."""
    if layers < 2:
        raise ValueError(f"{LAYERS_8B} must be at least 2, got {layers}")
    measured = []
    for count in (1, layers):
        with scratch_folder() as folder:
            checkpoint = make_checkpoint(folder / "checkpoint", count, shape="8b")
            measured.append(export(checkpoint, folder / "out", "--no-hints"))
    one, many = measured
    rows = [[str(count), f"{run.seconds:.0f}", f"{run.peak_bytes / 1e9:.2f}"] for count, run in ((1, one), (layers, many))]
    scale = 31 / (layers - 1)
    seconds = one.seconds + (many.seconds - one.seconds) * scale
    peak = one.peak_bytes + (many.peak_bytes - one.peak_bytes) * scale
    rows.append(["32 (extrapolated)", f"{seconds:.0f}", f"{peak / 1e9:.2f}"])
    return "\n\n".join(["## Exporting the shape of Llama-3.1-8B", table(["layers", "seconds", "peak GB"], rows)])


def _markdown(measured: Export, checkpoint: Path, build: Path, layers: int) -> str:
    bundle = ClientBundle.open(build / CLIENT)
    size = ModelSize.of(load_config(str(checkpoint)))
    hints, predicted = folder_bytes(bundle.hints), size.hint_file_bytes(bundle.ring)
    client, worker = folder_bytes(build / CLIENT), folder_bytes(build / WORKER)
    rows = [[what, f"{seconds:.1f}"] for what, seconds in grouped(measured).items()]
    rows.append(["**all**", f"**{measured.seconds:.1f}**"])
    sizes = [
        ["peak resident memory of the export", f"{measured.peak_bytes / 1e9:.2f} GB"],
        ["client bundle", f"{client / 1e9:.2f} GB"],
        ["of it hints", f"{hints / 1e9:.3f} GB"],
        ["hints, predicted from the configuration", f"{predicted / 1e9:.3f} GB ({hints / predicted - 1:+.2%} real)"],
        [
            "client plan without hints, predicted",
            f"{size.plan_bytes / 1e9:.3f} GB ({(client - hints) / 1e9:.3f} GB real)",
        ],
        ["worker bundle", f"{worker / 1e9:.2f} GB ({size.worker_bytes(8) / 1e9:.2f} GB predicted)"],
    ]
    return "\n\n".join(
        [
            "## Exporting and compiling Llama-3.2-1B",
            f"`hecompile export llama` of {layers} layers with `{' '.join(OPTIONS)}`, ring {bundle.ring.ring_dim} x "
            f"{bundle.ring.rank} ({size.hint_rows} rows of hints), in a process of its own. Target: under 120 s and 4 GB.",
            table(["phase", "seconds"], rows),
            table(["bytes", ""], sizes),
        ]
    )
