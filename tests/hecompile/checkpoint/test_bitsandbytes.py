"""Dequantise what bitsandbytes has quantised, and refuse parts that do not belong together.

`bitsandbytes.safetensors` was written by the library itself: matrices of 32 × 64 in NF4 with nested scales, in FP4, and in
8 bits, each with what the library dequantises it to.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from hecompile.checkpoint.formats.bitsandbytes import dequantised
from hecompile.checkpoint.formats.safetensors_files import safetensors_tensors
from hecompile.checkpoint.loading import load_model
from hecompile.errors import InputError
from tests.hecompile.checkpoint.test_folder import TOKENS, change, refused
from tests.support.tiny import tiny_llama

RECORDED = Path(__file__).with_name("bitsandbytes.safetensors")
BLOCK = 64
NF4 = load_file(RECORDED)["nf4.weight.quant_map"]


def test_recorded_matrices_are_what_the_library_makes_of_them() -> None:
    found = dequantised(RECORDED, safetensors_tensors(RECORDED))
    assert {name for name in found if not name.startswith("expected.")} == {"nf4.weight", "fp4.weight", "int8.weight"}
    for name in ("nf4.weight", "fp4.weight"):
        assert found[name].shape == (32, 64)
        assert torch.equal(found[name].read(), found[f"expected.{name}"].read())
    # The library divides by 127 elsewhere, which rounds differently.
    torch.testing.assert_close(found["int8.weight"].read(), found["expected.int8.weight"].read(), rtol=1e-6, atol=0.0)


def four_bits(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Quantise a matrix as bitsandbytes does, blocks of its numbers in a row whatever the rows' length."""
    flat = weight.flatten()
    padded = torch.cat([flat, torch.zeros(-len(flat) % BLOCK)]).reshape(-1, BLOCK)
    absmax = padded.abs().amax(1)
    nearest = ((padded / absmax[:, None])[..., None] - NF4).abs().argmin(-1).flatten()[: len(flat)].to(torch.uint8)
    state = json.dumps({"quant_type": "nf4", "blocksize": BLOCK, "dtype": "float32", "shape": list(weight.shape)})
    return {
        name: (nearest[::2] << 4 | nearest[1::2])[:, None],
        f"{name}.absmax": absmax,
        f"{name}.quant_map": NF4.clone(),
        f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(list(state.encode()), dtype=torch.uint8),
    }


def quantise(directory: Path, bits: int) -> dict[str, Tensor]:
    """Put a quantised checkpoint in the place of a float one; return its tensors. Its down_proj has rows of 48."""
    tensors = {name: value.clone() for name, value in load_file(directory / "model.safetensors").items()}
    for name in [name for name in tensors if "_proj" in name]:
        weight = tensors.pop(name)
        if bits == 4:
            tensors |= four_bits(name, weight)
            continue
        scales = weight.abs().amax(1)
        module = name.removesuffix(".weight")
        tensors[name] = (weight * (127.0 / scales)[:, None]).round().to(torch.int8)
        tensors |= {f"{module}.SCB": scales, f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8)}
    (directory / "model.safetensors").unlink()
    save_file(tensors, directory / "model.safetensors")
    change(directory / "config.json", quantization_config={"quant_method": "bitsandbytes", f"load_in_{bits}bit": True})
    return tensors


def reference(tensors: dict[str, Tensor], bits: int) -> LlamaForCausalLM:
    """Compute the dequantised model by the definitions, number by number."""
    model = LlamaForCausalLM(tiny_llama().config).eval()
    state = dict(tiny_llama().state_dict())
    for name, value in state.items():
        if "_proj" not in name:
            continue
        if bits == 8:
            state[name] = tensors[name].float() * tensors[name.replace(".weight", ".SCB")][:, None] / 127.0
            continue
        numbers = [half for byte in tensors[name].flatten().tolist() for half in (byte >> 4, byte & 15)]
        absmax = tensors[f"{name}.absmax"].tolist()
        flat = [float(NF4[number]) * absmax[index // BLOCK] for index, number in enumerate(numbers)]
        state[name] = torch.tensor(flat[: value.numel()]).reshape(value.shape)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_model_is_loaded_in_float32(damaged: Path, bits: int) -> None:
    tensors = quantise(damaged, bits)
    model, _ = load_model(damaged)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    wanted = reference(tensors, bits)
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(model(TOKENS).logits, wanted(TOKENS).logits, rtol=1e-4, atol=1e-4)
    error = (model(TOKENS).logits - tiny_llama()(TOKENS).logits).std() / tiny_llama()(TOKENS).logits.std()
    assert 0.0 < error < (1.0 if bits == 4 else 0.1)


Damage = Callable[[dict[str, Tensor]], object]
UP = "model.layers.0.mlp.up_proj.weight"
STATE = f"{UP}.quant_state.bitsandbytes__nf4"


def state_of(**changes: object) -> Damage:
    def damage(tensors: dict[str, Tensor]) -> None:
        state = json.loads(bytes(tensors[STATE].tolist())) | changes
        tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda tensors: tensors.pop(f"{UP}.absmax"), "parts of bitsandbytes that do not belong together"),
        (lambda tensors: tensors.pop(UP), "do not belong together"),
        (lambda tensors: tensors.update({UP: tensors[UP][:-1]}), "do not belong together"),
        (lambda tensors: tensors.update({UP: tensors[UP].float()}), "do not belong together"),
        (lambda tensors: tensors.update({f"{UP}.quant_map": torch.ones(15)}), "do not belong together"),
        (lambda tensors: tensors.update({f"{UP}.nested_absmax": torch.ones(1)}), "do not belong together"),
        (lambda tensors: tensors.update({STATE: torch.zeros(5000, dtype=torch.uint8)}), "cannot be read"),
        (lambda tensors: tensors.update({STATE: torch.zeros(9)}), "cannot be read"),
        (lambda tensors: tensors.update({STATE: torch.tensor(list(b"[" * 3000), dtype=torch.uint8)}), "cannot be read"),
        (lambda tensors: tensors.pop(STATE), "is [768, 1], but config.json asks for [48, 32]"),
        (state_of(shape=[1 << 40, 1 << 40]), "cannot be read"),
        (state_of(shape="ab"), "cannot be read"),
        (state_of(blocksize=0), "cannot be read"),
        (state_of(blocksize=True), "cannot be read"),
        (state_of(blocksize=1 << 20), "cannot be read"),
        (state_of(blocksize=32), "do not belong together"),
        (state_of(nested_blocksize=256, nested_offset="x"), "cannot be read"),
        (state_of(nested_blocksize=256, nested_offset=1.0), "do not belong together"),
        (state_of(shape=[32, 48]), "is [32, 48], but config.json asks for [48, 32]"),
    ],
)  # fmt: skip
def test_parts_that_do_not_belong_together_are_refused(damaged: Path, damage: Damage, words: str) -> None:
    tensors = quantise(damaged, 4)
    damage(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, damaged / "model.safetensors")
    assert words in refused(damaged)


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.SCB": torch.ones(47)}),
        lambda tensors: tensors.update(
            {"model.layers.0.mlp.up_proj.weight_format": torch.tensor(2, dtype=torch.uint8)}
        ),
        lambda tensors: tensors.pop(UP),
        lambda tensors: tensors.update({UP: tensors[UP].float()}),
    ],
    ids=["scales", "layout", "missing", "float"],
)
def test_parts_of_8_bits_that_do_not_belong_together_are_refused(damaged: Path, damage: Damage) -> None:
    tensors = quantise(damaged, 8)
    damage(tensors)
    save_file(tensors, damaged / "model.safetensors")
    assert "up_proj.weight has parts of bitsandbytes that do not belong together" in refused(damaged)


def test_scales_that_are_not_finite_are_refused(damaged: Path) -> None:
    tensors = quantise(damaged, 4)
    tensors[f"{UP}.absmax"][0] = torch.inf
    save_file(tensors, damaged / "model.safetensors")
    with pytest.raises(InputError, match=r"up_proj\.weight has values that are infinite"):
        load_model(damaged)
