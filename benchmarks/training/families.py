"""Measure, for one real model of every family, how exact the float graph is and how many bytes a trained token moves.

A model has the widths of the published one, random weights, one block (as many as its kinds of attention need) and a small
vocabulary: bytes per token and layer depend on widths and ranges, parity on what the block computes. Nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from benchmarks.report import table
from hecompile.checkpoint.families import FAMILIES
from hecompile.compiler.frontend import export_onnx
from hecompile.compiler.options import CompileOptions
from hecompile.compiler.pipeline import approximate, lower_linear
from hecompile.errors import InputError
from hecompile.graph.interpreter import Interpreter, graph_inputs
from hecompile.passes.offload.attach_lora import AttachLora
from hecompile.plan.circuits import SplitPlan

_VOCABULARY = 512
_LENGTH = 32


@dataclass(frozen=True)
class _Model:
    """Name a published model: its family, layers, widths and what else it sets (from its config.json).

    chosen: experts that a token goes to; the model made here has two.
    """

    family: str
    layers: int
    settings: dict[str, Any] = field(default_factory=dict)
    blocks: int = 1
    chosen: int = 0


def _wide(hidden: int, ffn: int, heads: int, groups: int, **further: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": ffn, "num_attention_heads": heads, "num_key_value_heads": groups,
        **further,
    }  # fmt: skip


_MODELS = {
    "Llama-3.2-1B": _Model("llama", 16, _wide(2048, 8192, 32, 8)),
    "Mistral-7B": _Model("mistral", 32, _wide(4096, 14336, 32, 8)),
    "Qwen2.5-0.5B": _Model("qwen2", 24, _wide(896, 4864, 14, 2)),
    "Qwen3-0.6B": _Model("qwen3", 28, _wide(1024, 3072, 16, 8, head_dim=128)),
    "Gemma-2B": _Model("gemma", 18, _wide(2048, 16384, 8, 1, head_dim=256)),
    "Gemma-2-2B": _Model("gemma2", 26, _wide(2304, 9216, 8, 4, head_dim=256), 2),
    "Gemma-3-1B": _Model("gemma3_text", 26, _wide(1152, 6912, 4, 1, head_dim=256, sliding_window_pattern=2), 2),
    "Phi-3-mini": _Model("phi3", 32, _wide(3072, 8192, 32, 32)),
    "OLMo-2-1B": _Model("olmo2", 16, _wide(2048, 8192, 16, 16)),
    "Granite-3.1-2B": _Model(
        "granite", 40,
        _wide(2048, 8192, 32, 8, embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.015625,
              logits_scaling=8.0),
    ),
    "SmolLM3-3B": _Model("smollm3", 36, _wide(2048, 11008, 16, 4)),
    "GPT-2": _Model("gpt2", 12, {"n_embd": 768, "n_head": 12, "n_layer": 1}),
    "Pythia-410M": _Model(
        "gpt_neox", 24, {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
    ),
    "Mixtral-8x7B": _Model("mixtral", 32, _wide(4096, 14336, 32, 8, num_local_experts=2, num_experts_per_tok=2), 1, 2),
    "Qwen3-30B-A3B": _Model(
        "qwen3_moe", 48,
        _wide(2048, 6144, 32, 4, head_dim=128, moe_intermediate_size=768, num_local_experts=2, num_experts_per_tok=2), 1, 8,
    ),
}  # fmt: skip
_SMALL = ("Qwen2.5-0.5B", "GPT-2")


def run(quick: bool) -> str:
    """Return the section: a table with one row per family."""
    rows = [_row(name, _MODELS[name]) for name in (_SMALL if quick else _MODELS)]
    headings = ("model", "family", "difference", "weight bits", "bytes per token and layer", "layers", "MB per token")
    return f"## Families\n\n{(__doc__ or '').partition(chr(10) * 2)[2].strip()}\n\n{table(headings, rows)}"


def _row(name: str, model: _Model) -> list[str]:
    family = FAMILIES[model.family]
    made = _make(model)
    graph = export_onnx(made)
    tokens = torch.randint(3, _VOCABULARY, (4, _LENGTH), generator=torch.Generator().manual_seed(1))
    difference = _difference(made, approximate(graph.clone()), tokens)
    del made
    options = CompileOptions(
        lora=AttachLora(target_modules=family.linears), sequence_buckets=(_LENGTH, 128), experts="routed"
    )
    samples = tuple(map(tuple, tokens.tolist()))
    try:
        plan, _ = lower_linear(graph.clone(), options, samples)
    except InputError:  # the widest products do not reach the default precision with the default weights
        options = dataclasses.replace(options, weight_bits=8)
        plan, _ = lower_linear(graph, options, samples)
    per_layer = _bytes_per_token(plan, model.chosen) / model.blocks
    figures = [f"{per_layer:,.0f}", str(model.layers), f"{per_layer * model.layers / 1e6:.2f}"]
    return [name, model.family, f"{difference:.0e}", str(options.weight_bits), *figures]


def _make(model: _Model) -> Any:
    family = FAMILIES[model.family]
    depth = {} if "n_layer" in model.settings else {"num_hidden_layers": model.blocks}
    tokens = {"vocab_size": _VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = getattr(transformers, family.configuration)(
        **tokens, **depth, **model.settings, attn_implementation="eager"
    )
    torch.manual_seed(0)
    return getattr(transformers, family.model)(config).eval()


def _difference(made: Any, graph: Any, tokens: torch.Tensor) -> float:
    mask = torch.ones_like(tokens)
    with torch.no_grad():
        expected = made(input_ids=tokens, attention_mask=mask).logits
        found = Interpreter(graph).run(graph_inputs(tokens, mask, graph))["logits"]
    return float((found - expected).abs().max() / (expected.max() - expected.min()))


def _bytes_per_token(plan: SplitPlan, chosen: int) -> float:
    """Count what a token sends and receives in all products, forward and backward; `chosen` experts are like the first."""
    total = 0
    for circuit in plan.circuits:
        times = 1 if ".experts." not in circuit.linear else chosen if ".experts.0." in circuit.linear else 0
        total += times * (circuit.parameters.bytes_up(1) + circuit.parameters.bytes_down(1))
    return total
