"""The section on compiling: its arithmetic and its run of the command line, on the small Llama."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.training import compile_1b
from benchmarks.training.compile_1b import Export, export, grouped
from hecompile.bundles.kinds import CLIENT
from hecompile.models import TINY_LLAMA


def test_every_second_is_in_a_group() -> None:
    phases = {"load": 2.0, "simplify": 0.5, "select_parameters": 1.5, "resume": 0.1, "hints (rows)": 3.0, "write": 1.0}
    groups = grouped(Export(10.0, 0, phases))
    assert sum(groups.values()) == pytest.approx(10.0)
    assert groups["start-up"] == pytest.approx(1.9) and groups[compile_1b.PASSES] == pytest.approx(2.0)


def test_a_real_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_1b, "OPTIONS", ("--batch-size", "2", "--sequence-buckets", "32"))
    measured = export(Path(TINY_LLAMA), tmp_path / "out")
    assert measured.peak_bytes > 1 << 28 and {"load", "hints (rows)"} <= measured.phases.keys()
    text = compile_1b._markdown(measured, Path(TINY_LLAMA), tmp_path / "out", 4)
    assert "| **all** |" in text and (tmp_path / "out" / CLIENT).is_dir()


def test_a_failed_export_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"has no config\.json"):
        export(tmp_path, tmp_path / "out")
