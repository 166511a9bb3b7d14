"""Compare what `hecompile doctor` says of this machine with what the engines and numba then do."""

from __future__ import annotations

from pathlib import Path

import pytest

from hecompile.bundles.worker import WorkerBundle
from hecompile.errors import WorkerError
from hecompile.runtime.client import machine
from hecompile.runtime.worker.engines import ENGINES, create_engine


def test_the_machine(tmp_path: Path) -> None:
    here = machine.look_at_machine(tmp_path)
    assert here.cores >= 1 and 0 < here.memory_available <= here.memory and here.disk_free > 0
    assert here.instructions.keys() == machine.INSTRUCTIONS.keys()


def test_engines_that_are_not_usable_refuse_and_auto_takes_the_one_that_is_named(tmp_path: Path) -> None:
    bundle = WorkerBundle(tmp_path, "ab" * 32, {})
    states = {state.name: state for state in machine.look_at_engines()}
    assert states.keys() == ENGINES.keys() - {"auto"}
    assert create_engine("auto", bundle).name == machine.engine_of_auto()
    for name, state in states.items():
        if state.usable:
            assert create_engine(name, bundle).name == name
        else:
            with pytest.raises(WorkerError, match=name):
                create_engine(name, bundle)
            assert state.note


@pytest.mark.parametrize(
    ("vnni", "fast", "chosen"), [(True, True, "vnni"), (False, True, "torch"), (False, False, "onnxruntime")]
)
def test_auto_on_other_processors(monkeypatch: pytest.MonkeyPatch, vnni: bool, fast: bool, chosen: str) -> None:
    monkeypatch.setattr(machine.vnni_kernel, "supported", lambda: vnni)
    monkeypatch.setattr(machine, "int8_products_are_fast", lambda: fast)
    assert machine.engine_of_auto() == chosen
    states = {state.name: state for state in machine.look_at_engines()}
    assert states["vnni"].usable is vnni and bool(states["torch"].note) is not fast


def test_the_kernel_cache_is_a_folder_that_numba_can_write_to(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = machine.look_at_kernel_cache().folder
    assert folder is not None and folder.is_dir()

    def nowhere(function: object) -> None:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(machine.numba, "njit", lambda **_: nowhere)
    assert machine.look_at_kernel_cache().folder is None
