"""Pretraining end to end at toy size: report, resumption, and the baselines against counts by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from hecompile.errors import InputError
from hecompile.models.making.baselines import bigram_loss, unigram_loss
from hecompile.models.making.pretrain import Recipe, build_model, make, token_stream, train
from hecompile.models.tokenizer import train_tokenizer
from hecompile.models.worlds.public_world import documents

TOY = Recipe(
    documents=60, heldout_documents=10, vocab_size=300, hidden_size=16, intermediate_size=32, layers=1, heads=2,
    kv_heads=1, steps=4, batch=2, length=32, warmup_steps=1,
)  # fmt: skip


def test_make_writes_a_loadable_directory_and_leaves_no_checkpoint(tmp_path: Path) -> None:
    report = make(TOY, tmp_path / "out", tmp_path / "checkpoint.pt")
    assert not (tmp_path / "checkpoint.pt").exists()
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert report["parameters"] == sum(p.numel() for p in model.parameters())
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 300
    assert report["tokens_seen"] == 4 * 2 * 32


def test_a_resumed_run_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = documents(TOY.documents)
    tokenizer = train_tokenizer(texts, TOY.vocab_size, TOY.max_position_embeddings)
    stream = token_stream(tokenizer, texts)
    whole = build_model(TOY, tokenizer)
    with monkeypatch.context() as patch:  # keeps the checkpoint, as a run that was stopped does
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
        train(whole, stream, TOY, tmp_path / "checkpoint.pt", checkpoint_every=3)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 3
    resumed = build_model(TOY, tokenizer)
    train(resumed, stream, TOY, tmp_path / "checkpoint.pt", resume=True)
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], weight, rtol=1e-4, atol=1e-5)


def test_resume_refuses_a_missing_or_foreign_checkpoint(tmp_path: Path) -> None:
    texts = documents(TOY.documents)
    tokenizer = train_tokenizer(texts, TOY.vocab_size, TOY.max_position_embeddings)
    stream = token_stream(tokenizer, texts)
    model = build_model(TOY, tokenizer)
    with pytest.raises(InputError, match="no checkpoint"):
        train(model, stream, TOY, tmp_path / "none.pt", resume=True)
    torch.save({"recipe": {"steps": 1}}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="other options"):
        train(model, stream, TOY, tmp_path / "other.pt", resume=True)
    with pytest.raises(InputError, match="one batch needs 2"):
        train(model, stream[:40], TOY, tmp_path / "none.pt")


def test_baselines_equal_counts_by_hand() -> None:
    text, heldout = np.array([0, 1, 0, 1, 0, 2]), np.array([0, 1, 0])
    # Unigram, add one: p(1) = (2 + 1) / 9, p(0) = (3 + 1) / 9.
    assert unigram_loss(text, heldout, 3) == pytest.approx(-(math.log(3 / 9) + math.log(4 / 9)) / 2)
    # Bigram: after 0 come 1, 1, 2; after 1 come 0, 0. The best k of the grid is 0.001.
    k = 0.001
    expected = -(math.log((2 + k) / (3 + 3 * k)) + math.log((2 + k) / (2 + 3 * k))) / 2
    assert bigram_loss(text, heldout, 3) == pytest.approx(expected)
