"""Refuse, from config.json alone and with one line, every setting that is malformed or not supported."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hecompile.checkpoint.loading import load_configuration
from hecompile.compiler.frontend import load_checkpoint, load_config
from hecompile.errors import InputError
from hecompile.inspection.prediction import ModelSize, prediction_table

ODD = (
    None, True, False, 0, 1, -1, 3, 7, 2**31, 10**400, 0.5, -0.5, float("nan"), float("inf"), "", "x", "32", [], [1, "x"],
    [[]], {}, {"rope_type": "yarn"}, {"a": {"b": 1}}, "silu", "llama", "float16",
)  # fmt: skip


def refused(directory: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_config(str(directory))
    message = str(caught.value)
    assert str(directory) in message and "\n" not in message and len(message) < len(str(directory)) + 400
    return message


def change(directory: Path, name: str = "config.json", **changes: object) -> None:
    path = directory / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_scaling": {"rope_type": "proportional"}}, "'proportional'; supported: default, linear, dynamic, yarn"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_scaling lacks short_factor, which rope_type longrope needs"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1]}}, "short_factor has 1 numbers"),
        ({"rope_scaling": {"type": "longrope", "short_factor": 2}}, "short_factor must be a list of numbers, got 2"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta": 1}}, "has 'beta', which rope_type yarn does not"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope_type 'spiral'; supported: default"),
        ({"rope_scaling": {"rope_type": "linear"}}, "lacks factor, which rope_type linear needs"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, "rope_scaling.factor must be a number above 0, got -1"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta must be a number above 0, got 0"),
        ({"rope_parameters": {"full_attention": {}}}, "has 'full_attention', which rope_type default does not know"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; supported: 1"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish'; supported: silu, swish, gelu"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config .* quantised \\('gptq'\\)"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantised \\('awq'\\).* dequantize\\(\\) it"),
        ({"quantization_config": {"quant_method": ["bitsandbytes"]}}, "quantised \\(\\['bitsandbytes'\\]\\)"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compression_config .*compressed-tensors"),
        ({"bos_token_id": 128000}, "bos_token_id is 128000, which is no token: the vocabulary has ids 0 to 258"),
        ({"eos_token_id": [2, 300]}, "eos_token_id is 300, which is no token"),
        ({"pad_token_id": -1}, "pad_token_id is -1, which is no token"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number from 1 to 4096, got 0"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers must be a whole number"),
        ({"hidden_size": 34}, "hidden_size 34 is not divisible by num_attention_heads 4"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not divisible by num_key_value_heads 3"),
        ({"head_dim": 7}, "a head has 7 features"),
        ({"vocab_size": "259"}, "vocab_size must be a whole number from 1 to 16777216, got '259'"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps must be a number above 0"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false, got 'no'"),
        ({"attention_bias": "yes"}, "attention_bias must be true or false, got 'yes'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "supported: LlamaForCausalLM"),
        ({"model_type": "bloom"}, "architecture 'bloom'; supported: llama, mistral"),
        ({"model_type": 5}, "architecture 5; supported: llama, mistral"),
        ({"is_causal": False}, "is_causal is False; supported: True"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named_without_the_weights(damaged: Path, changes: dict[str, Any], said: str) -> None:
    (damaged / "model.safetensors").unlink()
    change(damaged, **changes)
    with pytest.raises(InputError, match=said):
        load_config(str(damaged))
    refused(damaged)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "5", "null", '"llama"', "[" * 100_000, '{"vocab_size": ' + "9" * 5000 + "}"]
)
def test_what_is_no_object(damaged: Path, text: str) -> None:
    (damaged / "config.json").write_text(text)
    assert "config.json" in refused(damaged)


def test_bytes_that_are_no_text(damaged: Path) -> None:
    (damaged / "config.json").write_bytes(b"\xff\xfe{")
    assert "config.json cannot be read: not UTF-8" in refused(damaged)


@pytest.mark.parametrize("eos", ["2", 2.5, {"a": 1}, [[2]], -1, 259])
def test_ends_of_an_answer_that_are_no_tokens(damaged: Path, eos: object) -> None:
    change(damaged, "generation_config.json", eos_token_id=eos)
    assert "generation_config.json: eos_token_id is" in refused(damaged)


def test_every_mutation_loads_or_is_refused_with_one_line(damaged: Path) -> None:
    """Change, drop and add keys at random: the result is a model that computes, or one InputError."""
    config = json.loads((damaged / "config.json").read_text())
    config |= {"rope_scaling": None, "head_dim": 8, "quantization_config": None}
    draw, loaded = random.Random(5), 0
    single = [{key: odd} for key in config for odd in ODD]
    several = [{key: draw.choice(ODD) for key in draw.sample(sorted(config), 3)} for _ in range(200)]
    for changes in [*single, *several]:
        (damaged / "config.json").write_text(json.dumps(config | changes))
        try:
            read = load_configuration(damaged)
        except InputError as error:
            assert "\n" not in str(error)
            continue
        loaded += 1
        assert prediction_table(ModelSize.of(read), 8, 64).row_count
    for key in config:
        (damaged / "config.json").write_text(json.dumps({name: value for name, value in config.items() if name != key}))
        try:
            load_checkpoint(str(damaged)).model(torch.tensor([[1, 2, 3]]))
        except InputError as error:
            assert "\n" not in str(error)
    assert loaded > 50


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_tensor_that_is_not_finite_is_named(damaged: Path, value: float) -> None:
    path = damaged / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has values that are infinite"):
        load_checkpoint(str(damaged))


def test_a_tensor_of_integers_is_named(damaged: Path) -> None:
    path = damaged / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.norm\.weight is I8; supported: F64, F32, F16, BF16"):
        load_checkpoint(str(damaged))
