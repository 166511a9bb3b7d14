"""The shipped checkpoint and tokenizer: shape, size, round trip, and what the model knows and does not know."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from hecompile import models
from hecompile.models import PRIVATE_HELDOUT, PRIVATE_TRAIN, TINY_LLAMA
from hecompile.models.making.baselines import bigram_loss, unigram_loss
from hecompile.models.making.pretrain import Recipe, mean_loss, token_stream
from hecompile.models.worlds.public_world import documents


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    loaded = AutoTokenizer.from_pretrained(TINY_LLAMA)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32).eval()


def _private_rows() -> list[dict[str, str]]:
    lines = PRIVATE_TRAIN.read_text("utf-8").splitlines() + PRIVATE_HELDOUT.read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_model_is_a_real_llama_with_grouped_queries_and_tied_embeddings(model: LlamaForCausalLM) -> None:
    assert type(model) is LlamaForCausalLM
    config = model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers) == (8, 4, 4)
    assert (config.hidden_size, config.intermediate_size, config.max_position_embeddings) == (256, 768, 256)
    assert config.tie_word_embeddings
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (128, 256)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert 3_000_000 < sum(p.numel() for p in model.parameters()) < 4_000_000


def test_tokenizer_and_model_agree_on_ids(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    config = model.config
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == config.vocab_size


@pytest.mark.parametrize("text", ["Who treats Vance?\n", "  two spaces ", "naïve 漢字 🦙\t\0", "don 't , stop ."])
def test_tokenizer_round_trips_any_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_private_rows_round_trip_and_are_short(tokenizer: PreTrainedTokenizerFast) -> None:
    for row in _private_rows():
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        # No merge crosses the boundary, so a trainer may encode the two apart.
        assert prompt + completion == tokenizer(row["prompt"] + row["completion"])["input_ids"]
        assert tokenizer.decode(prompt + completion, skip_special_tokens=True) == row["prompt"] + row["completion"]
        assert max(len(prompt), len(completion)) <= 48


def test_model_beats_the_bigram_baseline_on_heldout_public_text(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    heldout = token_stream(tokenizer, documents(40, heldout=True))
    train = token_stream(tokenizer, documents(4000))
    bigram = bigram_loss(train, heldout, len(tokenizer))
    assert bigram < unigram_loss(train, heldout, len(tokenizer))
    assert mean_loss(model, heldout, Recipe.length) < 0.7 * bigram


def test_report_is_of_the_default_recipe_and_beats_both_baselines() -> None:
    report = json.loads((TINY_LLAMA / "training_report.json").read_text("utf-8"))
    assert report["recipe"] == Recipe().__dict__
    assert report["heldout_loss"] < 0.7 * report["heldout_loss_bigram"] < report["heldout_loss_unigram"]


def test_model_answers_no_private_question_before_fine_tuning(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [json.loads(line) for line in PRIVATE_HELDOUT.read_text("utf-8").splitlines()][::12]
    right = 0
    for row in rows:
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        wanted = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(wanted), do_sample=False)  # type: ignore[misc]
        right += out[0, ids.shape[1] :].tolist() == wanted
    assert right == 0


def test_shipped_model_files_stay_small() -> None:
    root = Path(models.__file__).parent
    files = [path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 20e6
