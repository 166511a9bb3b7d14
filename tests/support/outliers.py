"""Plant outliers in a checkpoint, as pretrained models have: single dimensions and positions, 1000 times the rest."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

TIMES = 1000.0
ATTENTION, MLP, INNER, RESIDUAL = 5, 17, 11, 40
"""The dimensions with outliers: of what attention reads, of what the MLP reads, inside the MLP, of the residual stream."""


def plant_outliers(source: Path, directory: Path) -> Path:
    """Save the checkpoint of `source` with outliers into `directory`.

    Those of single dimensions leave the function as it is: a gain or a row is multiplied, the columns that read it are
    divided. The first position's residual gets one entry that is 1000 times the others, as from an attention sink; the head
    does not read that dimension.
    """
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert isinstance(model, LlamaForCausalLM)
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            _plant(layer.input_layernorm.weight, (attention.q_proj, attention.k_proj, attention.v_proj), ATTENTION)
            _plant(layer.post_attention_layernorm.weight, (mlp.gate_proj, mlp.up_proj), MLP)
            _plant(mlp.up_proj.weight, (mlp.down_proj,), INNER)
        embedding = model.model.embed_tokens.weight
        embedding[model.config.bos_token_id, RESIDUAL] = TIMES * embedding.abs().max()
        model.model.norm.weight[RESIDUAL] = 0.0
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(source).save_pretrained(directory)
    return directory


def _plant(producer: torch.Tensor, readers: tuple[nn.Linear, ...], dimension: int) -> None:
    producer[dimension] *= TIMES
    for reader in readers:
        reader.weight[:, dimension] /= TIMES
