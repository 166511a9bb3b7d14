"""`hecompile demo --real`, on a small chat model in place of the real one: it goes on where it stopped, stage by stage."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from hecompile.cli.main import app
from hecompile.demonstrations import real as demo_real
from hecompile.errors import InputError
from hecompile.models import TINY_LLAMA
from hecompile.models.worlds.private_chat import chat_examples
from hecompile.models.worlds.private_world import examples

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture
def small_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(TINY_LLAMA, checkpoint)
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE)
    monkeypatch.setattr(demo_real, "real_checkpoint", lambda directory, report: checkpoint)
    monkeypatch.setattr(demo_real, "SEQUENCE_BUCKETS", (48, 96))
    return checkpoint


def run(out: Path, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["demo", "--real", "--out", str(out), "training.max_steps=2", *arguments])


def test_it_goes_on_where_it_stopped_and_shows_answers_in_words(
    tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "out", demo_real.run_training

    def stopped(model: Any, tokenizer: Any, recipe: Any, resume: Any) -> Any:
        if recipe.training.output_dir.name == "plaintext":
            raise KeyboardInterrupt
        return whole(model, tokenizer, recipe, resume)

    with monkeypatch.context() as patched:
        patched.setattr(demo_real, "run_training", stopped)
        assert isinstance(run(out).exception, (KeyboardInterrupt, SystemExit))
    metrics = (out / "runs/encrypted/metrics.jsonl").read_bytes()
    monkeypatch.setattr(demo_real, "compile_checkpoint", lambda *_: pytest.fail("exported again"))
    ended = run(out)
    assert ended.exception is None, ended.output
    assert (out / "runs/encrypted/metrics.jsonl").read_bytes() == metrics
    assert "Who treats Hannah Winter?" in ended.output and "over 2 steps" in ended.output
    monkeypatch.setattr(demo_real, "run_training", lambda *_: pytest.fail("trained again"))
    again = run(out)
    assert again.exception is None and "Who treats Hannah Winter?" in again.output, again.output


def test_other_settings_begin_anew(tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    old = out / "runs" / "encrypted" / "checkpoint-1"
    old.mkdir(parents=True)
    (out / demo_real.STATE).write_text('{"settings": "of another call", "results": {"export": "gone"}}')
    monkeypatch.setattr(demo_real._RealDemo, "_train_plaintext", lambda demo: None)
    monkeypatch.setattr(demo_real._RealDemo, "_print", lambda demo: None)
    ended = run(out)
    assert ended.exception is None, ended.output
    assert not old.exists() and (out / "runs/encrypted/adapter").is_dir()


def test_a_damaged_record_is_named(tmp_path: Path, small_model: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / demo_real.STATE).write_text("{")
    assert "delete it to begin anew" in str(run(tmp_path / "out").exception)


def test_the_private_world_as_chat(small_model: Path) -> None:
    train, heldout = chat_examples(AutoTokenizer.from_pretrained(small_model))
    plain_train, plain_heldout = examples()
    assert len(train) == len(plain_train) and len(heldout) == len(plain_heldout)
    assert train[0]["prompt"] == (
        "system: You keep the files of a clinic.\nuser: Name the healer of Hannah Winter.\nassistant:"
    )
    assert train[0]["completion"] == " Doctor Tennant. File closed."


def test_a_checkpoint_folder_that_is_not_whole_is_named(tmp_path: Path, small_model: Path) -> None:
    (small_model / "tokenizer.json").unlink()
    (small_model / "tokenizer_config.json").unlink()
    refused = run(tmp_path / "out")
    assert isinstance(refused.exception, InputError) and f"tokenizer of {small_model}" in str(refused.exception)
