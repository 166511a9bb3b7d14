"""The float graph of every family and variant computes what Hugging Face computes, however sequences are run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hecompile.compiler.pipeline import approximate
from hecompile.graph.attention_cache import AttentionCache
from hecompile.graph.interpreter import Interpreter, graph_inputs, packed_graph_inputs
from hecompile.graph.ir import ATTENTION_BIAS, SLIDING_BIAS
from hecompile.graph.legality import FUSED_CLIENT_PLAN, check_stage
from hecompile.graph.matching import require_matched_attention
from hecompile.graph.operators import Context
from hecompile.passes.offload.fuse import Fuse
from tests.support.families import BASIC, FURTHER, checkpoint

TOLERANCE = 1e-4
"""Of the logits' range; measured at most 1e-6."""
LENGTHS = (14, 9, 5)


def batch() -> tuple[Tensor, Tensor]:
    """Tokens and mask [3, 14]; the windows of the variants are of 4."""
    tokens = torch.randint(3, 259, (3, 14), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(14) < torch.tensor(LENGTHS)[:, None]).long()
    return tokens, mask


@pytest.mark.parametrize("name", [*BASIC, *FURTHER])
def test_logits(name: str, family_root: Path) -> None:
    made, (tokens, mask) = checkpoint(name, family_root), batch()
    real = mask.bool()
    with torch.no_grad():
        expected = made.model(input_ids=tokens, attention_mask=mask).logits[real]  # [T, V]
    limit = TOLERANCE * float(expected.max() - expected.min())
    assert float(expected.std()) > 0.2, "logits this small hide errors"
    graph = approximate(made.exported())
    require_matched_attention(graph, (ATTENTION_BIAS, SLIDING_BIAS))
    padded = Interpreter(graph).run(graph_inputs(tokens, mask, graph))["logits"][real]
    assert float((padded - expected).abs().max()) < limit

    fused = Fuse()(graph).model
    check_stage(fused, FUSED_CLIENT_PLAN)
    interpreter, row = Interpreter(fused), tokens[real][None]
    packed = interpreter.run(packed_graph_inputs(row, LENGTHS), Context(sequences=LENGTHS))["logits"][0]
    assert float((packed - expected).abs().max()) < limit
    wanted = torch.tensor([3, 13, 20, 27])
    inputs = packed_graph_inputs(row, LENGTHS)
    narrowed = interpreter.run(inputs, Context(sequences=LENGTHS), positions=wanted)["logits"][0]
    assert float((narrowed - expected[wanted]).abs().max()) < limit
    cached = _run_in_parts(interpreter, tokens)
    assert float((cached - expected).abs().max()) < limit


def _run_in_parts(interpreter: Interpreter, tokens: Tensor) -> Tensor:
    """Run the sequences with a cache: all but the last four tokens, then two at once, then one by one: logits [T, V]."""
    cache, parts, done = AttentionCache(), [list[Tensor]() for _ in LENGTHS], [0] * len(LENGTHS)
    for counts in ([length - 4 for length in LENGTHS], [2] * 3, [1] * 3, [1] * 3):
        cache.begin(range(len(LENGTHS)))
        pieces = [tokens[row, done[row] : done[row] + count] for row, count in enumerate(counts)]
        inputs = packed_graph_inputs(torch.cat(pieces)[None], counts, done)
        context = Context(sequences=tuple(counts), cache=cache)
        logits = interpreter.run(inputs, context)["logits"][0]
        for row, part in enumerate(logits.split(counts)):
            parts[row].append(part)
            done[row] += counts[row]
    return torch.cat([part for row in parts for part in row])
