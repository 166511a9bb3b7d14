"""`hecompile demo` checks everything before it writes or replaces anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from hecompile.cli.main import app
from hecompile.demonstrations import small as demo_run
from hecompile.errors import InputError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("max_steps=3",), "did you mean training.max_steps"),
        (("training.max_steps=0",), "training.max_steps"),
        (("training.max_steps",), "key=value"),
        (("data.train_file=none.jsonl",), "none.jsonl"),
        (("data.validation_file=null",), "validation_file"),
        (("training.per_device_train_batch_size=99",), "batches of at most 16"),
        (("lora.r=3",), "lora.r is 3"),
    ],
)
def test_a_refused_demo_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr(demo_run, "compile_checkpoint", lambda *_: pytest.fail("the export has begun"))
    kept = [tmp_path / name for name in ("build/client/manifest.json", "runs/encrypted/adapter/a", "runs/other")]
    for path in kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"format": "hecompile-client"}')
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path), *arguments])
    assert isinstance(result.exception, InputError) and message in str(result.exception)
    assert all(path.is_file() for path in kept)


def test_a_folder_that_no_export_made_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "mine").write_text("mine")
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    assert isinstance(result.exception, InputError) and "holds no earlier build" in str(result.exception)
