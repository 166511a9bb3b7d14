"""The text of calibration is what was asked for, whatever a checkpoint says about generation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import GenerationConfig

from hecompile.compiler.calibration import write_samples
from hecompile.compiler.frontend import Checkpoint, load_checkpoint
from hecompile.compiler.polynomial_options import PolynomialOptions
from hecompile.passes.approximation.calibrate import Samples
from tests.support.tiny import SEED, exported, save_checkpoint, tiny_llama
from tests.support.training import make_tokenizer

SETTINGS = {
    "max_new_tokens": 100, "stop_strings": ["a"], "temperature": 0.1, "top_p": 0.2, "repetition_penalty": 5.0,
    "num_beams": 3,
    "suppress_tokens": [1, 3], "forced_eos_token_id": 2, "no_repeat_ngram_size": 1, "max_time": 1e-9, "guidance_scale": 2.0,
    "num_return_sequences": 2, "penalty_alpha": 0.6, "return_dict_in_generate": True,
}  # fmt: skip


def written(checkpoint: Checkpoint) -> Samples:
    return write_samples(checkpoint, exported(), PolynomialOptions(), SEED, 12)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    return written(load_checkpoint(str(save_checkpoint(tmp_path_factory.mktemp("plain") / "model"))))


def test_generation_config_of_a_checkpoint_has_no_effect(plain: Samples, tmp_path: Path) -> None:
    directory = save_checkpoint(tmp_path / "model")
    path = directory / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | SETTINGS))
    assert written(load_checkpoint(str(directory))) == plain
    assert len(plain) == 8 and {len(row) for row in plain} == {12}


def test_generation_config_of_a_model_has_no_effect_and_stays(plain: Samples) -> None:
    model = tiny_llama()
    before = model.generation_config
    own = GenerationConfig(**SETTINGS, eos_token_id=2, bos_token_id=1)
    try:
        model.generation_config = own
        assert written(Checkpoint("tiny", model, make_tokenizer())) == plain
        assert model.generation_config is own
    finally:
        model.generation_config = before


def test_no_token_that_ends_an_answer_is_written(plain: Samples, tmp_path: Path) -> None:
    directory = save_checkpoint(tmp_path / "model")
    ends = sorted({row[1] for row in plain} | {2})
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    rows = written(load_checkpoint(str(directory)))
    assert not {token for row in rows for token in row[1:]} & set(ends) and {len(row) for row in rows} == {12}
