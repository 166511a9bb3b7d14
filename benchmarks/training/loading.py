"""Measure what loading a checkpoint takes beside the model itself: peak memory and seconds, by format.

    python -m benchmarks loading [--quick]

Random weights of the shape of Llama-3.2-1B, 4 layers of it, are saved in each format under build/ (8 GB), and loaded by
`hecompile.checkpoint.loading.load_model` in a process of its own, as an export does first. Quick: 1 layer.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file, save_file

from benchmarks.report import ROOT, table
from benchmarks.training.builds import scratch_folder
from benchmarks.training.checkpoints import make_checkpoint

_SHARDS = 6


@dataclass(frozen=True)
class Loading:
    """Hold bytes of the model in float32, bytes resident before and at the peak of loading it, and seconds."""

    model: int
    before: int
    peak: int
    seconds: float

    @property
    def beside(self) -> int:
        """Return how much more than the model was resident at the peak."""
        return self.peak - self.before - self.model


def load_here(checkpoint: Path) -> Loading:
    """Load a checkpoint in this process, which must have loaded none before: its peak is that of the process."""
    from hecompile.checkpoint.loading import load_model

    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    model, _ = load_model(checkpoint)
    seconds = time.perf_counter() - start
    bytes_ = sum(value.numel() * value.element_size() for value in model.parameters())
    return Loading(bytes_, before, _peak_bytes(), seconds)


def _peak_bytes() -> int:
    """Return the most bytes that this program had resident; getrusage would count the process that started it, too."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def measure(checkpoint: Path) -> Loading:
    """Load a checkpoint in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.training.loading", str(checkpoint)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return Loading(**json.loads(done.stdout.splitlines()[-1]))


def save_formats(bfloat16: Path, folder: Path) -> dict[str, Path]:
    """Save a checkpoint of one safetensors file in other formats beside it; returns the folder of each."""
    tensors = load_file(bfloat16 / "model.safetensors")
    copies = {name: folder / name.replace(" ", "-") for name in ("shards", "torch", "float32")}
    for copy in copies.values():
        copy.mkdir()
        for path in bfloat16.glob("*.json"):
            shutil.copy(path, copy)
    names = sorted(tensors)
    shards = [f"model-{number + 1:05}-of-{_SHARDS:05}.safetensors" for number in range(_SHARDS)]
    for number, shard in enumerate(shards):
        save_file({name: tensors[name] for name in names[number::_SHARDS]}, copies["shards"] / shard)
    where = {name: shards[number % _SHARDS] for number, name in enumerate(names)}
    (copies["shards"] / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}), encoding="utf-8")
    torch.save(tensors, copies["torch"] / "pytorch_model.bin")
    save_file({name: value.float() for name, value in tensors.items()}, copies["float32"] / "model.safetensors")
    return {
        "safetensors, bfloat16": bfloat16,
        f"safetensors, bfloat16, {_SHARDS} shards": copies["shards"],
        "pytorch_model.bin, bfloat16": copies["torch"],
        "safetensors, float32": copies["float32"],
    }


def run(quick: bool) -> str:
    """Return Markdown: a row per format."""
    with scratch_folder() as folder:
        formats = save_formats(make_checkpoint(folder / "checkpoint", 1 if quick else 4), folder)
        return markdown({name: measure(checkpoint) for name, checkpoint in formats.items()})


def markdown(measured: dict[str, Loading]) -> str:
    """Return the section of these measurements."""
    rows = [
        [name, _gigabytes(one.model), _gigabytes(one.peak - one.before), f"{one.beside / 1e9:+.2f} GB", one.seconds]
        for name, one in measured.items()
    ]
    return "\n\n".join(
        [
            "## Loading a checkpoint",
            "Peak resident memory above that before, in a process of its own, with the file in the system's cache. The "
            "model is float32. Pages mapped from a file count, and are the system's to take back.",
            table(["format", "model in float32", "peak above the start", "beside the model", "seconds"], rows),
        ]
    )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def main() -> None:
    parser = argparse.ArgumentParser(description="Load a checkpoint, and print what that took as JSON.")
    parser.add_argument("checkpoint", type=Path)
    print(json.dumps(vars(load_here(parser.parse_args().checkpoint))))


if __name__ == "__main__":
    main()
