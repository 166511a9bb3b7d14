"""Provide the random two-layer Llama of the tests, exported once per session, and a checkpoint directory of it."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from transformers import LlamaForCausalLM

from hecompile.compiler.frontend import export_onnx
from hecompile.compiler.options import CompileOptions
from hecompile.he.random.sampling import PublicSeed
from hecompile.passes.offload.attach_lora import AttachLora
from tests.support.training import make_base, make_tokenizer

SEED = PublicSeed.from_hex("5eed" * 16)
OPTIONS = CompileOptions(
    lora=AttachLora(r=2, lora_alpha=4.0, target_modules=("q_proj", "v_proj", "down_proj")),
    effective_bits=8.0,
    weight_bits=10,
    batch_size=2,
    sequence_buckets=(8, 16),
    public_seed=SEED,
)


@cache
def tiny_llama() -> LlamaForCausalLM:
    """2 layers, hidden size 32, 4 heads over 2 key-value heads, 259 tokens. Not to be changed by a test."""
    return make_base().eval()


@cache
def _exported() -> onnx.ModelProto:
    return ir.to_proto(export_onnx(tiny_llama()))


def exported() -> ir.Model:
    """Return a copy of the export of `tiny_llama`."""
    return ir.from_proto(_exported())


def save_checkpoint(directory: Path) -> Path:
    tiny_llama().save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def samples() -> tuple[tuple[int, ...], ...]:
    """Draw calibration tokens: 4 sequences of 8."""
    tokens = torch.randint(3, 259, (4, 8), generator=torch.Generator().manual_seed(7))
    return tuple(tuple(row) for row in tokens.tolist())


def coarse(text: str) -> str:
    """Round the floats of a printed model to 5 digits: the last ones differ between machines."""
    return re.sub(r"\d+\.\d{6,}(e-?\d+)?", lambda match: f"{float(match[0]):.5g}", text)
