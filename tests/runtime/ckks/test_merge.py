"""An adapter is merged into the weights of a polynomial plan as PEFT does, and by the same rules as it is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from hecompile.compiler.ckks import merged_checkpoint
from hecompile.compiler.frontend import Checkpoint
from hecompile.errors import InputError
from tests.support.training import make_base, make_tokenizer

TOKENS = torch.tensor([[1, 70, 80, 90]])


def checkpoint() -> Checkpoint:
    return Checkpoint("model", make_base().eval(), make_tokenizer())


def saved(directory: Path, **settings: Any) -> Path:
    options = {
        "r": 2,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "down_proj"],
        "init_lora_weights": False,
    } | settings
    torch.manual_seed(5)
    peft.get_peft_model(make_base(), peft.LoraConfig(**options)).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("settings", [{}, {"layers_to_transform": [1]}], ids=["all layers", "one layer"])
def test_merging_is_pefts(tmp_path: Path, settings: dict[str, Any]) -> None:
    adapter = saved(tmp_path / "a", **settings)
    expected: Any = peft.PeftModel.from_pretrained(make_base(), adapter).eval()
    merged = merged_checkpoint(checkpoint(), adapter)
    assert torch.allclose(merged.model(TOKENS).logits, expected(TOKENS).logits, atol=1e-5)
    assert (merged.model(TOKENS).logits - make_base().eval()(TOKENS).logits).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"use_rslora": True}, "use_rslora is True"),
        ({"use_dora": True}, "use_dora is True"),
        ({"rank_pattern": {"q_proj": 1}}, "rank_pattern is"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"target_modules": ["lm_head"]}, "has no place for base_model.model.lm_head"),
    ],
)
def test_an_adapter_that_means_something_else_is_refused(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        merged_checkpoint(checkpoint(), saved(tmp_path / "a", **settings))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("alora_invocation_tokens", [5], "alora_invocation_tokens is"),
        ("r", 4, "does not fit model: .*lora_A.weight is \\[2, 32\\] but must be \\[4, 32\\]"),
        ("r", 0, "r must be a whole number from 1"),
        ("lora_alpha", "8", "lora_alpha must be a number above 0, got '8'"),
        ("of_next_year", False, "has the setting 'of_next_year'"),
    ],
)
def test_a_setting_that_does_not_fit_is_named(tmp_path: Path, name: str, value: object, said: str) -> None:
    path = saved(tmp_path / "a") / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(InputError, match=said):
        merged_checkpoint(checkpoint(), tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.clear(), "no matrices for it"),
        (lambda state: state.pop(min(state)), "is missing but must be"),
        (lambda state: state.update({min(state): torch.full((2, 88), float("inf"))}), "has values that are not finite"),
        (lambda state: state.update(extra=torch.ones(1)), "has no place for extra"),
    ],
)
def test_matrices_that_do_not_fit_are_named(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    path = saved(tmp_path / "a") / "adapter_model.safetensors"
    state = {name: value.clone() for name, value in load_file(path).items()}
    change(state)
    path.unlink()
    save_file(state, path)
    with pytest.raises(InputError, match=said):
        merged_checkpoint(checkpoint(), tmp_path / "a")
