"""Read the tensors of a GGUF file of a Llama, dequantised to float32, a tensor at a time.

Names and the order of rows follow llama.cpp's conversion of Hugging Face's Llama (convert_hf_to_gguf.py): there the two
halves of each head's rows are interleaved in q_proj and k_proj, which is undone here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hecompile.checkpoint.formats.gguf_header import GgufHeader, TensorEntry
from hecompile.checkpoint.formats.stored import Stored
from hecompile.errors import InputError
from hecompile.extras import install_command
from hecompile.mapped_files import map_array

ROTARY_FACTORS = "rope_freqs.weight"
"""Divisors of the rotary frequencies; they follow from the configuration (`hecompile.checkpoint.gguf`)."""
_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def gguf_library(path: object) -> Any:
    """Return the package `gguf`. Raises InputError that says how it is installed."""
    try:
        import gguf
    except ImportError as error:
        command = install_command("gguf")
        raise InputError(f"{path}: GGUF files are read by a package that is not installed: {command}") from error
    return gguf


def gguf_tensors(header: GgufHeader, heads: int, key_heads: int) -> dict[str, Stored]:
    """Return the tensors of a file by their names in LlamaForCausalLM; one that a Llama has not keeps its own.

    heads, key_heads: of the attention. Raises InputError for a type that is not read, a tensor that is not whole in the
    file, or two that share bytes: the float32 form of all is then at most some twenty times the file.
    """
    library = gguf_library(header.path)
    sizes = {entry.name: _checked_bytes(header, entry, library) for entry in header.tensors}
    _refuse_overlaps(header, sizes)
    found: dict[str, Stored] = {}
    for entry in header.tensors:
        if entry.name == ROTARY_FACTORS:
            continue
        name = model_name(entry.name)
        rows = heads if ".q_proj." in name else key_heads if ".k_proj." in name else 0
        kind = library.GGMLQuantizationType(entry.kind).name
        is_float = not re.fullmatch(r"I\d+", kind)
        found[name] = Stored(entry.shape, kind, is_float, _reader(header, entry, sizes[entry.name], rows, library))
    return found


def model_name(name: str) -> str:
    """Return a tensor's name in LlamaForCausalLM, its own where a Llama has none like it."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    found = _LAYER.fullmatch(name)
    if found is None or found[2] not in _INSIDE:
        return name
    return f"model.layers.{int(found[1])}.{_INSIDE[found[2]]}.{found[3]}"


def read_entry(header: GgufHeader, name: str) -> Tensor | None:
    """Return one tensor in float32, None where the file has none of this name. Raises InputError as `gguf_tensors` does."""
    entry = next((entry for entry in header.tensors if entry.name == name), None)
    if entry is None:
        return None
    library = gguf_library(header.path)
    return _reader(header, entry, _checked_bytes(header, entry, library), 0, library)()


def _checked_bytes(header: GgufHeader, entry: TensorEntry, library: Any) -> int:
    """Return the bytes of a tensor in the file. Raises InputError where its type is not read or it is not whole."""
    try:
        kind = library.GGMLQuantizationType(entry.kind)
        block, size = library.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise InputError(f"{header.path}: tensor {entry.name} has ggml type {entry.kind}, which is not known") from None
    if not entry.shape or entry.shape[-1] % block:
        raise InputError(
            f"{header.path}: tensor {entry.name} is {list(entry.shape)}, no multiple of {kind.name}'s {block}"
        )
    count = math.prod(entry.shape) // block * size
    if entry.start + count > header.size:
        raise InputError(f"{header.path}: tensor {entry.name} ends after the file's end: it is not complete")
    return count


def _refuse_overlaps(header: GgufHeader, sizes: dict[str, int]) -> None:
    end, before = 0, ""
    for entry in sorted(header.tensors, key=lambda entry: entry.start):
        if entry.start < end:
            raise InputError(f"{header.path}: tensors {before} and {entry.name} share bytes")
        end, before = entry.start + sizes[entry.name], entry.name


def _reader(header: GgufHeader, entry: TensorEntry, count: int, heads: int, library: Any) -> Callable[[], Tensor]:
    kind = library.GGMLQuantizationType(entry.kind)

    def read() -> Tensor:
        if count == 0:
            return torch.empty(entry.shape)
        stored = library.quants.quant_shape_to_byte_shape(entry.shape, kind)
        if kind == library.GGMLQuantizationType.F64:
            values = map_array(header.path, np.float64, entry.shape, entry.start).astype(np.float32)
        else:
            try:
                values = library.dequantize(map_array(header.path, np.uint8, stored, entry.start), kind)
            except NotImplementedError:
                reason = f"{kind.name}, which the package gguf does not dequantise"
                raise InputError(f"{header.path}: tensor {entry.name} is {reason}") from None
        tensor = torch.from_numpy(np.array(values, dtype=np.float32).reshape(entry.shape))
        return tensor if heads == 0 else _in_halves(tensor, heads)

    return read


def _in_halves(weight: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's order of a head's rows: pairs that turn together are neighbours there, and half a head apart here."""
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])  # [heads, head_dim / 2, 2, in]
    return pairs.swapaxes(1, 2).reshape(weight.shape).contiguous()
