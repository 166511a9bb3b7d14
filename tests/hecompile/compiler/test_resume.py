"""An interrupted export goes on from the circuits it had completed, with the seed it had drawn, and from nothing else."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hecompile.bundles.client import ClientBundle
from hecompile.bundles.worker import WorkerBundle
from hecompile.compiler import circuit_writer
from hecompile.compiler.circuit_writer import RESUMED
from hecompile.compiler.linear import compile_checkpoint
from hecompile.errors import InputError
from hecompile.he.setup import PreparedMatrix
from hecompile.passes.offload.lower_worker import LowerWorker
from tests.hecompile.compiler.test_build import hashes
from tests.support.tiny import OPTIONS

COMPLETE, CIRCUITS = 6, 15
FRESH = dataclasses.replace(OPTIONS, public_seed=None)

_KILLED_MIDWAY = """
import os, pathlib, signal, sys
from hecompile.compiler import circuit_writer
from hecompile.compiler.linear import compile_checkpoint
from tests.hecompile.compiler import test_resume

write_hint, written = circuit_writer.write_hint, []

def stop(directory, circuit, *hint):
    if len(written) == test_resume.COMPLETE:
        (directory / f"{circuit}.npy.{os.getpid()}.partial").write_bytes(b"half a hint")
        os.kill(os.getpid(), getattr(signal, sys.argv[4]))
    written.append(circuit)
    return write_hint(directory, circuit, *hint)

circuit_writer.write_hint = stop
compile_checkpoint(sys.argv[1], pathlib.Path(sys.argv[2]), getattr(test_resume, sys.argv[3]))
"""


def interrupted(checkpoint: Path, out: Path, options: str = "OPTIONS", with_signal: str = "SIGKILL") -> Path:
    """A real export, killed while it writes a hint; returns what it left behind."""
    command = [sys.executable, "-c", _KILLED_MIDWAY, str(checkpoint), str(out), options, with_signal]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == -getattr(signal, with_signal), done.stderr
    assert not out.exists()
    staged = out.parent / f".{out.name}.partial"
    assert len((staged / "circuits.jsonl").read_text().splitlines()) == 1 + COMPLETE
    return staged


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Record the shapes of the weights that hints are made of from here on."""
    shapes: list[torch.Size] = []
    setup = PreparedMatrix.setup

    def counting(self: PreparedMatrix, weight: torch.Tensor) -> torch.Tensor:
        shapes.append(weight.shape)
        return setup(self, weight)

    monkeypatch.setattr(PreparedMatrix, "setup", counting)
    return shapes


@pytest.fixture(scope="module")
def killed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an export that was killed. Copy it before using it."""
    return interrupted(checkpoint, tmp_path_factory.mktemp("killed") / "out")


@pytest.fixture
def out(killed: Path, tmp_path: Path) -> Path:
    """Return a target with a copy of that folder beside it."""
    subprocess.run(["cp", "-r", str(killed), str(tmp_path / killed.name)], check=True)
    return tmp_path / "out"


def staged(out: Path) -> Path:
    return out.parent / ".out.partial"


def test_a_killed_export_goes_on_and_gives_the_same_bytes(
    build: Path, checkpoint: Path, out: Path, made: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    lowered: list[str | None] = []
    call = LowerWorker.call
    monkeypatch.setattr(LowerWorker, "call", lambda self, model: (lowered.append(model.graph.name), call(self, model))[1])
    heard: list[tuple[str, int, int]] = []
    compile_checkpoint(str(checkpoint), out, OPTIONS, lambda *event: heard.append(event))
    assert len(made) == CIRCUITS - COMPLETE
    assert len(lowered) == CIRCUITS - COMPLETE + 1  # and the known answer
    (resumed,) = [event for event in heard if event[0] == RESUMED]
    assert 0 < resumed[1] < resumed[2]
    assert hashes(out) == hashes(build)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.usefixtures("quick_export")
def test_the_seed_that_was_drawn_is_kept(checkpoint: Path, tmp_path: Path, made: list[torch.Size]) -> None:
    left = interrupted(checkpoint, tmp_path / "out", options="FRESH", with_signal="SIGTERM")
    seed = json.loads((left / "export.json").read_text())["public_seed"]
    plan_id = compile_checkpoint(str(checkpoint), tmp_path / "out", FRESH)
    bundle = ClientBundle.open(tmp_path / "out" / "client")
    assert bundle.public_seed.hex() == seed and len(made) == CIRCUITS - COMPLETE
    assert bundle.plan_id == WorkerBundle.open(tmp_path / "out" / "worker").plan_id == plan_id


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _hint(left: Path) -> Path:
    return min((left / "build" / "client" / "hints").glob("*.npy"))


def _circuit(left: Path) -> Path:
    name = json.loads((left / "circuits.jsonl").read_text().splitlines()[1])["name"]
    return left / "build" / ".worker.kept.partial" / "circuits" / name / "1" / "model.onnx"


def _tear(left: Path) -> None:
    journal = left / "circuits.jsonl"
    journal.write_text(journal.read_text()[:-20])


def _garble(left: Path) -> None:
    journal = left / "circuits.jsonl"
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join([*lines[:3], "not json", *lines[4:]]) + "\n")


def _strange_files(left: Path) -> None:
    (left / "build" / "client" / "diary.txt").write_text("not of this build")
    (left / "build" / "client" / "hints" / "other.npy").write_text("nor this")


@pytest.mark.usefixtures("quick_export")
@pytest.mark.parametrize(
    ("damage", "remade"),
    [
        (lambda left: _flip(_hint(left)), CIRCUITS - COMPLETE + 1),
        (lambda left: _hint(left).unlink(), CIRCUITS - COMPLETE + 1),
        (lambda left: _flip(_circuit(left)), CIRCUITS - COMPLETE + 1),
        (_tear, CIRCUITS - COMPLETE + 1),
        (_garble, CIRCUITS - 2),
        (lambda left: (left / "circuits.jsonl").unlink(), CIRCUITS),
        (_strange_files, CIRCUITS - COMPLETE),
    ],
    ids=["hint", "no hint", "circuit", "torn line", "line that is none", "no journal", "strange files"],
)
def test_what_is_damaged_is_made_again(
    damage: Callable[[Path], object], remade: int, build: Path, checkpoint: Path, out: Path, made: list[torch.Size]
) -> None:
    damage(staged(out))
    compile_checkpoint(str(checkpoint), out, OPTIONS)
    assert len(made) == remade
    for folder in ("client/hints", "client/tokenizer", "worker"):
        assert hashes(out / folder) == hashes(build / folder)
    assert {path.name for path in (out / "client").iterdir()} == {path.name for path in (build / "client").iterdir()}


@pytest.mark.usefixtures("quick_export")
@pytest.mark.parametrize("change", [{"weight_bits": 8}, {"public_seed": None}, {"sequence_buckets": (8, 32)}])
def test_another_request_starts_afresh(
    change: dict[str, object], checkpoint: Path, out: Path, made: list[torch.Size]
) -> None:
    compile_checkpoint(str(checkpoint), out, dataclasses.replace(OPTIONS, **change))
    assert len(made) == CIRCUITS
    bundle = ClientBundle.open(out / "client")
    assert (bundle.public_seed == OPTIONS.public_seed) == ("public_seed" not in change)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.usefixtures("quick_export")
def test_hints_of_another_plan_are_not_taken(checkpoint: Path, out: Path, made: list[torch.Size]) -> None:
    """An equal request by name, for weights that have changed since: the plan id differs."""
    journal = staged(out) / "circuits.jsonl"
    first, *others = journal.read_text().splitlines()
    journal.write_text("\n".join([json.dumps({"plan_id": "0" * len(json.loads(first)["plan_id"])}), *others]) + "\n")
    compile_checkpoint(str(checkpoint), out, OPTIONS)
    assert len(made) == CIRCUITS


def test_a_folder_that_is_not_an_exports_is_refused_and_untouched(checkpoint: Path, tmp_path: Path) -> None:
    foreign = tmp_path / ".out.partial"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("the only copy")
    with pytest.raises(InputError, match=r"\.out\.partial is in the way and is not an interrupted export"):
        compile_checkpoint(str(checkpoint), tmp_path / "out", OPTIONS)
    assert (foreign / "thesis.tex").read_text() == "the only copy" and not (tmp_path / "out").exists()


def test_two_exports_into_one_place(checkpoint: Path, out: Path) -> None:
    before = hashes(staged(out))
    with (staged(out) / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another export is writing"):
            compile_checkpoint(str(checkpoint), out, OPTIONS)
    assert hashes(staged(out)) == before


@pytest.mark.usefixtures("quick_export")
@pytest.mark.parametrize("complete", [0, COMPLETE], ids=["before the first hint", "midway"])
def test_an_interrupt_keeps_what_is_complete(
    complete: int, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_hint, written = circuit_writer.write_hint, []

    def interrupting(directory: Path, circuit: str, *hint: object) -> Path:
        if len(written) == complete:
            raise KeyboardInterrupt
        written.append(circuit)
        return write_hint(directory, circuit, *hint)

    monkeypatch.setattr(circuit_writer, "write_hint", interrupting)
    with pytest.raises(KeyboardInterrupt):
        compile_checkpoint(str(checkpoint), tmp_path / "out", OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ([".out.partial"] if complete else [])
