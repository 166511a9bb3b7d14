"""Make the text that a plan is calibrated on: the model writes it itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import onnx_ir as ir
import torch
from transformers import GenerationConfig

from hecompile.checkpoint.loading import answer_ends
from hecompile.compiler.byte_model import in_bytes
from hecompile.compiler.frontend import Checkpoint
from hecompile.compiler.pipeline import approximate
from hecompile.compiler.polynomial_options import PolynomialOptions
from hecompile.graph.interpreter import Interpreter, graph_inputs
from hecompile.he.random.sampling import PublicSeed
from hecompile.passes.approximation.calibrate import Samples

_SEQUENCES = 8
SHORT_LENGTH = 128
"""Tokens per sequence that are enough where no polynomial needs the ranges of long sequences: with 32, weights are
rounded for the sample more than for the text that comes."""

_MOST_FLOATS = 2**29
"""Weights up to which a model writes in float32: two gigabytes."""


def write_samples(
    checkpoint: Checkpoint, exported: ir.Model, polynomials: PolynomialOptions, seed: PublicSeed, length: int
) -> Samples:
    """Let the model write its own calibration text: in its language, without private data, equal for equal seeds.

    Args:
        exported: the graph of `checkpoint`. It writes where the model was trained for another attention than softmax, which
            the Hugging Face class computes; it is left as it is.
        length: tokens per sequence; at most the positions that the model has.
    """
    number = int(seed.derive("calibration").stream("tokens").uint32(0, 1)[0])
    config = checkpoint.model.config
    start = 0 if config.bos_token_id is None else int(config.bos_token_id)
    if polynomials.retrained:
        return _write_by_graph(exported, polynomials, start, number, length)
    with _filled(checkpoint):
        return _write_by_checkpoint(checkpoint, start, number, min(length, config.max_position_embeddings))


def _write_by_checkpoint(checkpoint: Checkpoint, start: int, seed: int, length: int) -> Samples:
    prompts = torch.full((_SEQUENCES, 1), start)
    model = cast("Any", checkpoint.model)
    asked = GenerationConfig(
        do_sample=True, top_k=0, max_length=length, min_length=length, pad_token_id=start,
        eos_token_id=sorted(answer_ends(model)) or None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.no_grad(), _without_own_settings(model):
        torch.manual_seed(seed)
        tokens = model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), generation_config=asked)
    return tuple(tuple(int(token) for token in row) for row in tokens)


@contextmanager
def _filled(checkpoint: Checkpoint) -> Iterator[None]:
    """Give a model its weights for as long as it writes: as they are where there is room for them."""
    weights = checkpoint.weights
    if weights is None:
        yield
        return
    if weights.elements > _MOST_FLOATS:
        with in_bytes(checkpoint.model, weights):
            yield
        return
    zeros = {parameter: parameter.data for parameter in checkpoint.model.parameters()}
    try:
        for name, parameter in checkpoint.model.named_parameters():
            parameter.data = weights.read(name)
        yield
    finally:
        for parameter, data in zeros.items():
            parameter.data = data


@contextmanager
def _without_own_settings(model: Any) -> Iterator[None]:
    """Keep the model's own defaults of generation out: `generate` takes whatever is not asked for from them."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _write_by_graph(exported: ir.Model, polynomials: PolynomialOptions, start: int, seed: int, length: int) -> Samples:
    trained = PolynomialOptions(attention=polynomials.trained_attention())
    interpreter = Interpreter(approximate(exported.clone(), trained))
    tokens = torch.full((_SEQUENCES, 1), start, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        while tokens.shape[1] < length:
            logits = interpreter.run(graph_inputs(tokens, torch.ones_like(tokens)))["logits"]  # [B, S, V]
            probabilities = torch.softmax(logits[:, -1], dim=-1)  # [B, V]
            tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
    return tuple(tuple(row) for row in tokens.tolist())
