"""Let one process at a time write a folder: real processes, one of which has begun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hecompile.compiler.ckks import export_polynomial
from hecompile.compiler.linear import compile_checkpoint
from hecompile.compiler.options import CkksOptions, CompileOptions
from hecompile.errors import InputError
from hecompile.files import only_writer
from hecompile.runtime.conversion.recipe import ConversionRecipe
from hecompile.runtime.conversion.train import convert
from hecompile.runtime.training.train import run_training
from tests.conftest import ROOT
from tests.support.training import make_model, make_recipe, make_tokenizer

HOLD = """
import sys
from pathlib import Path
from hecompile.files import only_writer

with only_writer(Path(sys.argv[1]), folder=sys.argv[2] == "folder"):
    print("held", flush=True)
    sys.stdin.read()
"""
TRAIN = """
import sys
from pathlib import Path
from hecompile.runtime.training.train import run_training
from tests.support.training import make_model, make_recipe, make_tokenizer

model, first = make_model(), True

def wait(*_):
    global first
    if first:
        first = False
        print("held", flush=True)
        sys.stdin.read()

model.register_forward_pre_hook(wait)
print(run_training(model, make_tokenizer(), make_recipe(Path(sys.argv[1]))).steps, flush=True)
"""


@contextmanager
def process(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Start a process, and wait until it says that it has begun."""
    started = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert started.stdout is not None and started.stdout.readline() == "held\n"
        yield started
    finally:
        started.kill()
        started.communicate()


def test_a_second_run_in_one_directory_is_refused_and_the_first_is_unharmed(tmp_path: Path) -> None:
    with process(TRAIN, str(tmp_path)) as first:
        for overwrite, resume in ((False, False), (True, False), (False, True)):
            recipe = make_recipe(tmp_path, overwrite_output_dir=overwrite)
            message = rf"training\.output_dir .*run is being written by another process \({first.pid}\); wait for it"
            with pytest.raises(InputError, match=message):
                run_training(make_model(), make_tokenizer(), recipe, resume=resume)
        output, _ = first.communicate("")
        assert output == "6\n"
    run = tmp_path / "run"
    assert sorted(path.name for path in run.iterdir()) == ["adapter", "checkpoint-3", "checkpoint-6", "metrics.jsonl"]
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 7  # six steps and an evaluation


def test_a_killed_run_does_not_block_the_next(tmp_path: Path) -> None:
    with process(TRAIN, str(tmp_path)) as first:
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert (tmp_path / "run/.lock").is_file()
        run_training(make_model(), make_tokenizer(), make_recipe(tmp_path, max_steps=1, eval_steps=None))
    assert not list(tmp_path.rglob("*lock"))


@pytest.mark.parametrize("kind", ["export", "ckks", "convert"])
def test_exports_and_conversions_are_refused_too(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "deep" / "out"
    with process(HOLD, str(out), "whole"):
        with pytest.raises(InputError, match=r"out is being written by another process \(\d+\)"):
            if kind == "export":
                compile_checkpoint("none", out, CompileOptions())
            elif kind == "ckks":
                export_polynomial("none", out, CkksOptions(sequence_length=8))
            else:
                recipe = {"model": "none", "out": out, "attention": "power", "data": {}}
                recipe["data"] = dict.fromkeys(("train_file", "validation_file"), tmp_path / "text")
                convert(ConversionRecipe.model_validate(recipe))
        assert [path.name for path in out.parent.iterdir()] == [".out.lock"]


def test_one_folder_has_one_lock_whatever_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "a" / "b{who}"
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with process(HOLD, str(out), "folder"):
        monkeypatch.chdir(tmp_path)
        for name in (Path("a/b{who}"), tmp_path / "link" / "b{who}", out / ".." / "b{who}"):
            with pytest.raises(InputError, match="is being written"), only_writer(name, folder=True):
                pass
            with pytest.raises(InputError, match="is being written"), only_writer(name):
                pass
        with only_writer(tmp_path / "a" / "c", folder=True):
            pass
    with only_writer(out, folder=True):  # whose holder was killed
        pass
    assert not list(out.iterdir()) and [path.name for path in out.parent.iterdir()] == [out.name]


def test_nothing_is_left_behind_and_content_stays(tmp_path: Path) -> None:
    with only_writer(tmp_path / "x" / "y", folder=True):
        pass
    assert not list(tmp_path.iterdir())
    with only_writer(tmp_path / "x", folder=True):
        (tmp_path / "x" / "file").write_text("kept")
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["file"]
    with (
        pytest.raises(InputError, match="file is a file; name a directory"),
        only_writer(tmp_path / "x" / "file", folder=True),
    ):
        pass
    with (
        pytest.raises(InputError, match=r"cannot write .*: Not a directory; name another"),
        only_writer(tmp_path / "x" / "file" / "below"),
    ):
        pass


def test_a_mounted_volume_is_locked_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and real(path, mode))
    with only_writer(volume, folder=True):
        assert [path.name for path in tmp_path.iterdir()] == ["volume"] and (volume / ".lock").is_file()
        with pytest.raises(InputError, match="is being written"), only_writer(volume, folder=True):
            pass
