"""Read every family's configuration as transformers saves it, and refuse what is not computed, within seconds by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from typer.testing import CliRunner

from hecompile.checkpoint.configuration import read_configuration
from hecompile.checkpoint.families import FAMILIES
from hecompile.checkpoint.rope import longest_exact
from hecompile.cli.main import app
from hecompile.compiler.linear import CompileOptions, compile_checkpoint
from hecompile.compiler.options import CkksOptions
from hecompile.errors import HecompileError, InputError
from hecompile.inspection.prediction import ModelSize
from tests.support.families import BASIC, FURTHER, ORIGINAL, checkpoint


def write(directory: Path, **settings: Any) -> Path:
    (directory / "config.json").write_text(json.dumps(settings))
    return directory


@pytest.mark.parametrize("name", FAMILIES)
def test_the_defaults_of_transformers_are_read(name: str, tmp_path: Path) -> None:
    """They are those of a real model of the family, with its sizes."""
    family = FAMILIES[name]
    expected = getattr(transformers, family.configuration)(**family.fixed)
    expected.save_pretrained(tmp_path)
    read = read_configuration(tmp_path)
    different = {
        key
        for key, value in expected.to_dict().items()
        if read.to_dict().get(key) != value and key not in ("dtype", "_name_or_path")
    }
    assert type(read) is type(expected) and different == set()
    assert ModelSize.of(read).layers == expected.num_hidden_layers


@pytest.mark.parametrize("name", [*BASIC, *FURTHER])
def test_what_a_variant_sets_is_read(name: str, family_root: Path) -> None:
    made = checkpoint(name, family_root)
    read, saved = read_configuration(made.directory).to_dict(), made.model.config.to_dict()
    family = FAMILIES[saved["model_type"]]
    for key in (*family.settings, "rope_parameters", "layer_types", "no_rope_layers", "bos_token_id"):
        assert read.get(key) == saved.get(key), key


OLDER: dict[str, tuple[dict[str, Any], Callable[[Any], Any], Any]] = {
    "gemma 3": (
        {"model_type": "gemma3_text", "rope_theta": 1000000, "rope_local_base_freq": 500, "sliding_window_pattern": 3,
         "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "num_hidden_layers": 3},
        lambda read: (read.rope_parameters["full_attention"], read.rope_parameters["sliding_attention"]["rope_theta"],
                      read.layer_types[1:]),
        ({"rope_type": "linear", "rope_theta": 1000000, "factor": 8.0}, 500, ["sliding_attention", "full_attention"]),
    ),
    "gpt_neox": (
        {"model_type": "gpt_neox", "rotary_pct": 0.5, "rotary_emb_base": 300},
        lambda read: (read.rope_parameters["partial_rotary_factor"], read.rope_parameters["rope_theta"]), (0.5, 300),
    ),
    "phi3": (
        {"model_type": "phi3", "rope_scaling": {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
         "original_max_position_embeddings": 16, "max_position_embeddings": 64,
         "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM":
                      "modeling_phi3.Phi3ForCausalLM", "AutoTokenizer": "Xenova/gpt-4o"}},
        lambda read: (read.rope_parameters["rope_type"], longest_exact(read)[0]), ("longrope", 16),
    ),
    "qwen3_moe": ({"model_type": "qwen3_moe", "num_experts": 64}, lambda read: read.num_experts, 64),
}  # fmt: skip
SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", OLDER)
def test_names_of_older_files_are_read(name: str, tmp_path: Path) -> None:
    settings, view, wanted = OLDER[name]
    assert view(read_configuration(write(tmp_path, **{**SIZES, **settings}))) == wanted


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_type": "gemma3"}, "architecture 'gemma3'; supported: llama, mistral, qwen2"),
        ({"model_type": "phi3", "auto_map": {"AutoConfig": "other.Config"}}, "auto_map names Python code"),
        ({"model_type": "llama", "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}}, "auto_map names"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "layer_types must be a list of 2, each full"),
        ({"model_type": "gemma2", "layer_types": ["full_attention", "chunked"]}, "layer_types must be a list of 2"),
        ({"model_type": "gemma2", "attn_logit_softcapping": -1}, "attn_logit_softcapping must be a number above 0"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 2]}, "no_rope_layers must be a list of 2, each 0 or 1"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window must be a whole number from 1"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.4}, "partial_rotary_factor 0.4 of 8 features are no pairs"),
        ({"model_type": "phi3", "rope_scaling": {"type": "linear", "factor": 2}}, "supported: default, longrope"),
        ({"model_type": "gemma3_text", "rope_parameters": {"global": {}}}, "has 'global'; supported: full_attention"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2, "sliding_window": 4},
         "layer_types has sliding_attention, and there is no window: sliding_window is 4, use_sliding_window False"),
        ({"model_type": "mixtral", "num_experts_per_tok": 9}, "num_experts_per_tok is 9, and there are 8 experts"),
        ({"model_type": "qwen3_moe", "num_experts": 4}, "num_experts_per_tok is 8, and there are 4 experts"),
    ],
)
def test_what_is_not_computed_is_refused_from_the_configuration(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        read_configuration(write(tmp_path, **{**SIZES, **settings}))


def test_a_setting_that_a_family_does_not_list_must_have_its_default(tmp_path: Path) -> None:
    gpt2 = {"model_type": "gpt2", "vocab_size": 32, "n_embd": 8, "n_layer": 1, "n_head": 2}
    assert read_configuration(write(tmp_path, **gpt2, reorder_and_upcast_attn=False)).n_head == 2
    for key in ("reorder_and_upcast_attn", "scale_attn_by_inverse_layer_idx"):
        with pytest.raises(InputError, match=f"{key} is True; supported: False"):
            read_configuration(write(tmp_path, **gpt2, **{key: True}))


def test_a_text_longer_than_longrope_s_switch_is_refused(family_root: Path, tmp_path: Path) -> None:
    for name in ("llama longrope", "phi3 longrope"):
        directory = str(checkpoint(name, family_root).directory)
        with pytest.raises(InputError, match=f"sequence bucket {ORIGINAL + 1} is longer than the {ORIGINAL} positions"):
            compile_checkpoint(directory, tmp_path / "out", CompileOptions(sequence_buckets=(ORIGINAL + 1,)))
    assert list(tmp_path.iterdir()) == []


def test_polynomials_are_refused_where_none_stand_for_the_parts(family_root: Path) -> None:
    for name in ("qwen2", "gpt2", "llama biases, gelu, linear rope"):
        config = checkpoint(name, family_root).model.config
        assert not CompileOptions().polynomials(config)
        for options in (CompileOptions(norm="polynomial"), CkksOptions(8)):
            with pytest.raises(InputError, match="supported: llama with silu or swish"):
                options.polynomials(config)


def test_export_takes_the_model_as_an_argument(family_root: Path, tmp_path: Path) -> None:
    """A model of another family than llama, its own linears as targets; what is wrong with it is said first."""
    directory, out = str(checkpoint("gpt2", family_root).directory), tmp_path / "out"
    arguments = ["--out", str(out), "--batch-size", "1", "--sequence-buckets", "8"]
    done = CliRunner().invoke(app, ["export", directory, *arguments])
    assert done.exit_code == 0, done.output
    targets = json.loads((out / "client" / "manifest.json").read_text())["plan"]["lora"]
    assert targets["target_modules"] == ["c_attn", "c_proj", "c_fc"] and targets["fan_in_fan_out"] is True
    for name, said in (("nowhere", "nowhere"), (str(tmp_path), "config.json")):
        refused = CliRunner().invoke(app, ["export", name, "--out", str(tmp_path / "other")])
        assert isinstance(refused.exception, HecompileError) and said in str(refused.exception)
    wrong = CliRunner().invoke(app, ["export", directory, *arguments, "--target-modules", "q_proj"])
    assert "target module 'q_proj' does not exist in this model; choose from c_attn" in str(wrong.exception)
